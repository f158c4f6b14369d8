"""Block shapes of linearized LoRA's kernels: rules, tables, what tuning finds, and GPUs that nobody has heard of."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from interpreter import run_python

import peta_fast as pf
from peta_fast import cli
from peta_fast.errors import CompatibilityError, ResourceError
from peta_fast.ops.linearized_lora import blocks, closed_form, dispatch, table, tuning

H200 = blocks.Place("sm_90", 132)
KEY = "sm_90/fused/M64-K4096-N4096-R16"
FOUND = {"BM": 64, "BN": 128, "BK": 64, "GROUP": 8, "num_warps": 4, "num_stages": 4}


@pytest.fixture(autouse=True)
def user_table(tmp_path, monkeypatch) -> Path:
    """The user's table of this test, which is not there yet."""
    file = tmp_path / "tables" / "tuning.json"
    monkeypatch.setenv("PETA_FAST_TUNING", str(file))
    blocks.forget()
    yield file
    monkeypatch.undo()
    blocks.forget()


def has_entries(file: Path, entries: dict) -> None:
    table.write(file, {key: {"blocks": found} for key, found in entries.items()})
    blocks.forget()


# ---------------------------------------------------------------- lookup


@pytest.mark.parametrize("n, expected", [(0, 16), (1, 16), (16, 16), (17, 32), (4096, 4096), (4097, 8192)])
def test_a_bucket_is_the_next_power_of_two(n, expected):
    assert blocks.bucket(n) == expected


def test_a_key_names_capability_kernel_sizes_and_rank():
    assert blocks.key_of(blocks.name_of("fused", True, True), H200, 33, 11008, 4096, 16) == (
        "sm_90/fused_general_dual/M64-K4096-N16384-R16"
    )


def test_what_was_measured_runs_in_its_bucket_on_its_gpu_and_nowhere_else(user_table):
    has_entries(user_table, {KEY: FOUND, "sm_90/crossover/K4096-N4096-R16": {"rows": 64}})
    assert blocks.chosen("fused", H200, 33, 4096, 4096, 16) == FOUND
    by_rule = blocks.fused_blocks(64, 16)
    assert by_rule != FOUND
    for other in [("fused", blocks.Place("sm_80", 108), 33, 4096, 4096, 16), ("fused", H200, 33, 4096, 4097, 16),
                  ("fused", H200, 33, 4096, 4096, 32), ("fused_general", H200, 33, 4096, 4096, 16)]:  # fmt: skip
        assert blocks.chosen(*other) == blocks.rule(other[0], other[2], other[5]) != FOUND
    assert blocks.fused_rows(False, False, H200, 4096, 4096, 16) == 64
    assert blocks.fused_rows(True, False, H200, 4096, 4096, 16) == blocks.FUSED_ROWS


def test_the_users_table_comes_before_the_one_that_is_shipped(user_table, tmp_path, monkeypatch):
    shipped = tmp_path / "shipped.json"
    monkeypatch.setattr(table, "SHIPPED", shipped)
    has_entries(shipped, {KEY: FOUND})
    assert blocks.chosen("fused", H200, 64, 4096, 4096, 16) == FOUND
    has_entries(user_table, {KEY: {**FOUND, "num_stages": 2}})
    assert blocks.chosen("fused", H200, 64, 4096, 4096, 16)["num_stages"] == 2


def test_the_shipped_table_is_sound():
    assert table.fault_of(json.loads(table.SHIPPED.read_text())) == ""


def test_the_users_table_lies_where_it_is_said_or_in_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("PETA_FAST_TUNING")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert table.user_file() == tmp_path / "peta_fast" / "tuning.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert table.user_file() == tmp_path / ".cache" / "peta_fast" / "tuning.json"


# ---------------------------------------------------------------- files


def as_text(entries: object, form: str = table.FORMAT) -> str:
    return json.dumps({"format": form, "entries": entries})


@pytest.mark.parametrize(
    "content",
    [
        '{"format": "peta_fast tun',
        "[]",
        '{"threads": 4}',
        as_text({}, "another 2"),
        as_text([KEY]),
        as_text({"sm_90/fused": {"blocks": FOUND}}),
        as_text({"sm_90/another/M64-K64-N64-R16": {"blocks": FOUND}}),
        as_text({KEY: FOUND}),
        as_text({KEY: {"blocks": {"BM": 64}}}),
        as_text({KEY: {"blocks": {**FOUND, "BM": 48}}}),
        as_text({KEY: {"blocks": {**FOUND, "BM": 1 << 20}}}),
        as_text({KEY: {"blocks": {**FOUND, "BM": "64"}}}),
        as_text({"sm_90/crossover/K64-N64-R16": {"blocks": {"rows": -1}}}),
        as_text({"sm_90/crossover/M64-K64-N64-R16": {"blocks": {"rows": 1}}}),
        "\udcff\udcfe",
    ],
)
def test_a_file_that_is_not_sound_is_left_out_with_one_warning_that_names_it(user_table, content):
    user_table.parent.mkdir()
    user_table.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.warns(RuntimeWarning, match="tuning.json: left out") as caught:
        for _ in range(3):
            assert blocks.chosen("fused", H200, 64, 4096, 4096, 16) == blocks.fused_blocks(64, 16)
            assert blocks.fused_rows(False, False, H200, 4096, 4096, 16) == blocks.FUSED_ROWS
    assert len(caught) == 1 and str(user_table) in str(caught[0].message)


def test_a_missing_file_is_no_fault():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert blocks.chosen("dA", H200, 64, 4096, 4096, 16) == blocks.dA_blocks(16)


def test_writing_adds_to_what_is_there(user_table):
    has_entries(user_table, {KEY: FOUND})
    has_entries(user_table, {KEY.replace("sm_90", "sm_80"): FOUND})
    assert sorted(table.entries_of(user_table)) == [KEY.replace("sm_90", "sm_80"), KEY]
    assert [f.name for f in user_table.parent.iterdir()] == [user_table.name]


def test_a_write_that_fails_leaves_the_old_table_whole(user_table, monkeypatch):
    has_entries(user_table, {KEY: FOUND})
    before = user_table.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        table.write(user_table, {KEY: {"blocks": {**FOUND, "BM": 32}}})
    assert user_table.read_bytes() == before
    assert [f.name for f in user_table.parent.iterdir()] == [user_table.name]


# ---------------------------------------------------------------- GPUs


@pytest.mark.parametrize("capability", [(7, 5), (8, 6), (13, 7)], ids=str)
def test_a_gpu_that_stands_in_no_table_gets_the_rule_and_as_many_programs_as_it_has_multiprocessors(
    capability, monkeypatch
):
    found = SimpleNamespace(major=capability[0], minor=capability[1], multi_processor_count=77)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    place = blocks.place_of.__wrapped__(torch.device("cuda", 0))
    assert place == blocks.Place(f"sm_{capability[0]}{capability[1]}", 77)
    for kernel in ("fused", "fused_general_dual", "prefill", "partials", "finish_general", "dA"):
        for R in (16, 32, 64, 128):
            assert blocks.chosen(kernel, place, 700, 4096, 4096, R) == blocks.rule(kernel, 700, R)


@pytest.mark.parametrize("kernel", ["fused", "prefill", "partials", "finish", "dA"])
def test_blocks_for_which_a_gpu_has_no_room_shrink_until_they_fit_and_are_remembered(kernel):
    where = (kernel, blocks.Place("sm_86", 84), 8192, 4096, 4096, 16)
    sizes = []
    while True:
        found = blocks.chosen(*where)
        sizes.append(found)
        if not blocks.shrink(*where):
            break
    assert sizes[0] == blocks.rule(kernel, 8192, 16)
    assert all(v == 16 for k, v in sizes[-1].items() if k in ("BM", "BN", "BK")) and sizes[-1]["num_stages"] == 2
    assert blocks.chosen(*where) == sizes[-1]
    assert len({json.dumps(s) for s in sizes}) == len(sizes)
    with blocks.forced(**{kernel: FOUND}):
        assert not blocks.shrink(*where)


def test_old_gpus_and_others_than_nvidias_run_plain_pytorch(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not dispatch.builds_kernels(torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert dispatch.builds_kernels(torch.device("cuda", 0))
    monkeypatch.setattr(torch.version, "hip", "6.3")
    assert not dispatch.builds_kernels(torch.device("cuda", 0))


def test_a_gpu_for_which_triton_builds_nothing_runs_plain_pytorch_with_one_warning(monkeypatch):
    launch = pytest.importorskip("peta_fast.ops.linearized_lora.launch")
    from triton.errors import TritonError

    def fails(*arguments):
        raise TritonError("sm_137 is not known\nand more")

    monkeypatch.setattr(launch, "forward", fails)
    monkeypatch.setattr(dispatch, "runs_kernels", lambda x, A0: x.device not in dispatch._refused)
    monkeypatch.setattr(dispatch, "_refused", set())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU of tomorrow")
    x, weight, A0, dB = (torch.randn(size).double() for size in ((3, 5), (4, 5), (2, 5), (4, 2)))
    arguments = (x, weight, None, A0, None, None, dB, None, 2.0, 0.0)
    with pytest.warns(RuntimeWarning, match=r"GPU of tomorrow \(sm_137 is not known\)") as caught:
        found = [dispatch.forward(*arguments)[0] for _ in range(2)]
    assert len(caught) == 1
    assert all(torch.equal(y, closed_form.forward(*arguments)[0]) for y in found)


# ---------------------------------------------------------------- tuning


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_nothing_to_measure(user_table):
    with pytest.raises(ResourceError, match="PyTorch sees no CUDA device"):
        pf.tune()
    assert not user_table.exists()


def test_a_cpu_is_refused_by_name():
    with pytest.raises(ResourceError, match="expected a CUDA device, got cpu"):
        pf.tune(device="cpu")


@pytest.mark.parametrize("shape", [(1, 2, 3), (0, 64, 64, 4), (1, 64, 64, 129), (1, 64, 64, 4.0)], ids=str)
def test_shapes_that_cannot_be_are_named(shape):
    with pytest.raises(CompatibilityError, match="expected .M, K, N, r."):
        tuning.checked(shape)


def test_the_command_takes_shapes(monkeypatch, capsys):
    given = {}
    monkeypatch.setattr(tuning, "tune", lambda shapes, **options: given.update(options, shapes=list(shapes)))
    assert cli.main(["tune", "64,4096,14336,16", "1,2,3,4", "--dual"]) == 0
    assert given == {"shapes": [(64, 4096, 14336, 16), (1, 2, 3, 4)], "dual": True, "file": None}
    assert cli.main(["tune", "64,4096"]) == 2
    assert "expected M,K,N,r such as" in capsys.readouterr().err


@pytest.mark.parametrize("R", [16, 32, 64, 128])
@pytest.mark.parametrize(
    "kernel", ["fused", "fused_general_dual", "prefill", "prefill_dual", "partials", "finish", "dA"]
)
def test_candidates_begin_with_the_rule_and_are_such_as_a_table_may_hold(kernel, R):
    found = blocks.candidates(kernel, 200, R)
    assert found[0] == blocks.rule(kernel, 200, R)
    assert len(found) == len({json.dumps(f, sort_keys=True) for f in found}) > 1
    key = f"sm_90/{kernel}/M64-K4096-N4096-R{R}"
    assert not any(table.fault_of({"format": table.FORMAT, "entries": {key: {"blocks": f}}}) for f in found)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> dict:
    """What linearized_lora_tuned.py found, and the file that it wrote."""
    pytest.importorskip("triton")
    file = tmp_path_factory.mktemp("tuned") / "found.json"
    ran = run_python("linearized_lora_tuned.py", file)
    assert ran.returncode == 0, ran.stderr
    return {**json.loads(ran.stdout), "file": json.loads(file.read_text())}


def test_the_fastest_candidates_that_run_and_are_right_are_found(tuned):
    after = tuned["after"]
    assert after["fused"]["BN"] == 64, "128 columns are said to be fastest but do not fit"
    assert after["prefill"]["BM"] == 128, "32 rows are slowest and wrong"
    assert (after["partials"]["BN"], after["finish"]["BK"], after["dA"]["BK"]) == (128, 256, 64)


def test_what_is_wrong_or_does_not_run_is_counted_out(tuned):
    said = {line.split()[1]: line for line in tuned["lines"] if line.startswith("interpreter")}
    assert "2 of 3 candidates" in said["prefill"] and "2 of 3 candidates" in said["prefill_general"]
    assert "rule" in said["partials"] and " us" in said["partials"]


def test_two_launches_take_over_where_they_were_faster(tuned):
    assert tuned["rows"] == 32
    assert tuned["way"] == "prefill_kernel"  # of 33 rows


def test_what_was_found_is_written_with_its_surroundings(tuned):
    assert tuned["file"]["entries"] == tuned["entries"]
    for entry in tuned["entries"].values():
        assert {"blocks", "device", "torch", "triton"} <= set(entry)
