"""The benchmarks themselves: rows, tables, the generator, the reference that they check results with, the floors."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from peta_fast.plan import make_plan
from peta_fast.recipe import load_recipe

if sys.platform != "linux":
    pytest.skip("the benchmarks measure Linux", allow_module_level=True)

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))

from family_files import get_family, merge_error  # noqa: E402
from floors import FileFloor, aligned, copies, reads  # noqa: E402
from merge_suite import arguments, write_results  # noqa: E402
from processes import own_memory, run_timed  # noqa: E402
from rows import REQUIRED, Row, best_and_median  # noqa: E402
from sparse_checkpoints import expert_recipe, expert_tensors, parse_headers  # noqa: E402
from table import COLUMNS, amount, markdown, read_rows  # noqa: E402
from ties_reference import Tensors, elected_mean, error_of, from_bf16, plain_pytorch, to_bf16, trim_of  # noqa: E402

ROW = Row(
    "merge_files[1b]", "848e6 parameters", 1.5, reference=210.0, floor=1.0, error=0.498, unit="s", nbytes=3 * 10**9
)


def table_cells(text: str) -> list[dict[str, str]]:
    head, _, *lines = ([cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines())
    return [dict(zip(head, line, strict=True)) for line in lines]


def test_a_row_has_every_field_that_rows_have():
    row = ROW.to_json()
    assert set(REQUIRED) <= set(row)
    assert row["times_faster"] == 140.0 and row["times_floor"] == 1.5 and row["gbps"] == 2.0
    assert row["device"] == "cpu" and "numpy" in row["versions"] and row["machine"] and row["commit"]


def test_a_row_without_peer_or_floor_has_no_ratio():
    row = Row("plan", "", 2.0).to_json()
    assert row["times_faster"] is None and row["times_floor"] is None and row["gbps"] is None


def test_rounds_are_summed_up_by_best_and_median():
    assert best_and_median([3.0, 1.0, 2.0]) == {"best": 1.0, "median": 2.0, "rounds": [3.0, 1.0, 2.0]}


def test_the_table_names_ours_reference_floor_ratios_and_error():
    (cells,) = table_cells(markdown([ROW.to_json()]))
    assert tuple(cells) == COLUMNS
    assert (cells["ours"], cells["reference"], cells["floor"]) == ("1.50 s", "210 s", "1.00 s")
    assert (cells["reference / ours"], cells["ours / floor"]) == ("140", "1.50")
    assert (cells["GB/s"], cells["error"]) == ("2.0", "0.498")


def test_a_table_shows_a_dash_for_what_was_not_measured():
    (cells,) = table_cells(markdown([Row("plan", "", 2.0).to_json()]))
    assert {cells[c] for c in ("reference", "floor", "reference / ours", "ours / floor", "GB/s", "error")} == {"-"}


def test_a_bar_in_a_cell_does_not_end_the_cell():
    assert r"a \| b" in markdown([{**ROW.to_json(), "shape": "a | b"}])


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(210.0, "s", "210 s"), (0.0125, "s", "12.5 ms"), (2e-6, "s", "2.00 µs"), (3 << 29, "bytes", "1.50 GiB"),
     (92 << 20, "bytes", "92.0 MiB"), (None, "s", "-")],
)  # fmt: skip
def test_amounts_are_scaled_to_three_digits(value, unit, text):
    assert amount(value, unit) == text


def test_the_table_takes_the_json_of_pytest_benchmark(tmp_path):
    extra = {"shape": "T3", "reference": 1.0, "floor": 0.001, "error": 0.5, "error_unit": "ulp", "gbps": 40.0}
    found = {"benchmarks": [{"name": "bench_ties[T3]", "stats": {"min": 0.002}, "extra_info": extra}]}
    (tmp_path / "results.json").write_text(json.dumps(found))
    (cells,) = table_cells(markdown(read_rows(tmp_path / "results.json")))
    assert (cells["name"], cells["ours"], cells["ours / floor"]) == ("bench_ties[T3]", "2.00 ms", "2.00")
    assert (cells["reference / ours"], cells["error"]) == ("500", "0.5 ulp")


def test_the_table_refuses_other_json(tmp_path):
    (tmp_path / "other.json").write_text('{"rows": 3}')
    with pytest.raises(ValueError, match="other.json: expected a list of rows"):
        read_rows(tmp_path / "other.json")


def test_the_suite_writes_json_that_the_table_reads_back(tmp_path):
    text = write_results([ROW], tmp_path / "results")
    assert markdown(read_rows(tmp_path / "results" / "merge_suite.json")) == text.read_text(encoding="utf-8")


def test_the_suite_wants_to_know_about_mergekit_unless_it_has_no_use_for_it(capsys):
    with pytest.raises(SystemExit):
        arguments(["--families", "f"])
    assert "--mergekit PYTHON" in capsys.readouterr().err
    assert arguments(["--families", "f", "--in-memory"]).parts == ["memory"]
    assert arguments(["--families", "f", "--skip-mergekit", "--sizes", "tiny"]).sizes == ["tiny"]


def digest(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_generator_gives_the_same_bytes_twice_and_others_for_another_seed(tmp_path):
    for name, seed in (("first", 0), ("second", 0), ("third", 1)):
        command = [sys.executable, BENCHMARKS / "make_llama_family.py", tmp_path / name, "--tasks", 1, "--seed", seed]
        subprocess.run([str(word) for word in command], check=True, capture_output=True)
    first, second, third = (digest(tmp_path / name) for name in ("first", "second", "third"))
    assert set(first) == {f"{m}/{f}" for m in ("base", "task0") for f in ("config.json", "model.safetensors")}
    assert first == second
    assert first["task0/model.safetensors"] != third["task0/model.safetensors"]


def test_a_merge_of_the_tiny_family_is_right_and_a_copy_of_its_base_is_not(tmp_path):
    import peta_fast

    family = get_family(tmp_path, "tiny")
    peta_fast.merge(family.recipe, tmp_path / "out")
    assert merge_error(family, tmp_path / "out").largest <= 0.5001
    assert merge_error(family, family.folder / "base").off > 0


def bf16(*values: float) -> np.ndarray:
    return to_bf16(np.array(values, np.float32))


def test_bf16_rounds_to_nearest_even():
    halfway = [1 + 2.0**-8, 1 + 3 * 2.0**-8, -(1 + 2.0**-8), 1 + 2.0**-8 + 2.0**-20]
    assert from_bf16(bf16(*halfway)).tolist() == [1.0, 1 + 2.0**-6, -1.0, 1 + 2.0**-7]


def test_equals_at_the_threshold_are_all_kept_or_the_first_of_them():
    delta = np.array([1, -2, 2, 3, 2], np.float32)
    assert trim_of(delta, 0.4, "all").keeps(delta, 0).tolist() == [False, True, True, True, True]
    assert trim_of(delta, 0.4, "first").keeps(delta, 0).tolist() == [False, True, False, True, False]


def test_the_elected_sign_averages_those_who_agree():
    kept = [np.array(row, np.float32) for row in ([4, 1, 0, 2], [-1, -3, 0, -2], [2, 1, 0, 0])]
    assert elected_mean(kept, [1, 1, 1], "all").tolist() == [3, -3, 0, 0]
    assert elected_mean(kept, [1, 1, 1], "first").tolist() == [3, -3, 0, 2]


def test_the_error_of_a_merge_counts_in_roundings():
    tensors = Tensors(bf16(1, 1, 1, 1), (bf16(1, 1, 1, 3), bf16(1, 1, 1, 5)))
    assert error_of(bf16(1, 1, 1, 4), tensors, [0.25, 0.25], [1, 1], "all").largest == 0
    wrong = error_of(bf16(1, 1, 1, 8), tensors, [0.25, 0.25], [1, 1], "all")
    assert (wrong.largest, wrong.off, wrong.compared) == (128.0, 1, 4)


def test_plain_pytorch_does_the_same_merge():
    import torch

    draw = np.random.default_rng(0)
    base = to_bf16(draw.standard_normal(999, np.float32))
    models = [to_bf16(from_bf16(base) + draw.standard_normal(999, np.float32)) for _ in range(3)]
    tensors = [torch.from_numpy(raw.view(np.int16)).view(torch.bfloat16).reshape(27, 37) for raw in (base, *models)]
    merged = plain_pytorch(tensors[0], tensors[1:], [0.3] * 3, [0.5, 0.3, 0.4])
    out = merged.flatten().view(torch.int16).numpy().view(np.uint16)
    assert error_of(out, Tensors(base, tuple(models)), [0.3] * 3, [0.5, 0.3, 0.4], "all").largest <= 0.5001


def test_a_floor_tries_every_way_and_leaves_no_file(tmp_path):
    inputs = [tmp_path / "a", tmp_path / "b"]
    for file in inputs:
        file.write_bytes(bytes(70_000))
    floor = FileFloor(inputs, 70_001, tmp_path / "scratch")
    floor.measure()
    floor.measure()
    assert floor.seconds > 0
    assert {"mapped, numpy sum", "pread"} <= {name.removeprefix("read: ") for name in floor.times}
    assert all(len(times) == 2 for times in floor.times.values())
    assert not (tmp_path / "scratch").exists()


@pytest.mark.parametrize("way", ["O_DIRECT", "mapped", "buffered"])
def test_a_floor_writes_as_many_bytes_as_it_says(way, tmp_path):
    from floors import WRITE_WAYS

    try:
        WRITE_WAYS[way](tmp_path / "out", 10_001, aligned(4096, fill=7))
    except OSError as error:
        pytest.skip(f"{way}: {error}")
    assert (tmp_path / "out").read_bytes() == b"\x07" * 10_001


def test_memory_floors_copy_and_read_every_byte():
    source, target = aligned(100_000, fill=3), aligned(100_000)
    assert all(taken > 0 for taken in copies([(target.ctypes.data, source.ctypes.data, 100_000)]).values())
    assert (target == 3).all()
    assert all(taken > 0 for taken in reads([(source.ctypes.data, 100_000)]).values())


def test_a_program_is_timed_and_its_own_memory_seen(tmp_path):
    code = "import time; held = bytearray(b'x') * (64 << 20); time.sleep(0.2); print(len(held))"
    done = run_timed([sys.executable, "-c", code], cwd=tmp_path, sample_every=0.005)
    assert done.stdout.strip() == str(64 << 20)
    assert 64 << 20 < done.peak_memory < 256 << 20


def test_a_program_that_fails_says_so(tmp_path):
    with pytest.raises(RuntimeError, match="ended with 1:[^$]*no such merge"):
        run_timed([sys.executable, "-c", "raise ValueError('no such merge')"], cwd=tmp_path)


def test_own_memory_leaves_file_backed_pages_out():
    status = "VmHWM:\t  900 kB\nRssAnon:\t  100 kB\nRssFile:\t  500 kB\nRssShmem:\t   28 kB\nThreads:\t2\n"
    assert own_memory(status) == 128 << 10


def test_sparse_checkpoints_have_true_headers_and_can_be_planned(tmp_path):
    tensors = list(expert_tensors(layers=2, experts=5))
    plan = make_plan(load_recipe(expert_recipe(tmp_path, tensors)))
    assert [t.name for t in plan.tensors] == [name for name, _ in tensors]
    assert parse_headers(tmp_path) == 4 * len(tensors)
    assert len(list(expert_tensors())) == 50_048
