"""inspect, diff and verify: what they say of sound, differing and damaged checkpoints."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import runner, toy, write_model, write_models
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch_file

from peta_fast.buffers import Buffer
from peta_fast.cli import _checkpoints
from peta_fast.cli._statistics import statistics
from peta_fast.journal import JOURNAL

LAST = "layers.2.weight"


@pytest.fixture
def folder(tmp_path):
    return write_models(tmp_path)


@pytest.fixture
def run(capsys):
    return runner(capsys)


def write_file(path: Path, **tensors: np.ndarray) -> Path:
    save_file(tensors, path)
    return path


# inspect


def test_inspect_tells_files_counts_and_tensors(folder, run):
    code, out, err = run("inspect", folder / "base")
    assert (code, err) == (0, "")
    assert re.search(r"^parameters +388$", out, re.M) and re.search(r"^dtypes +1 int64, 3 float32$", out, re.M)
    assert re.search(r"^architecture +Toy$", out, re.M) and re.search(r"^metadata +format=pt$", out, re.M)
    assert re.search(r"^layers\.1\.weight +float32 +\[16, 8\] +512 bytes$", out, re.M)


def test_json_of_inspect(folder, run):
    found = json.loads(run("inspect", folder / "base", "--json")[1])
    assert found["parameters"] == 388 and found["bytes"] == 3 * 512 + 32 and found["metadata"] == {"format": "pt"}
    assert {t["name"]: t["shape"] for t in found["tensors"]} == {k: list(v.shape) for k, v in toy(0).items()}
    assert "norm" not in found["tensors"][0]


def test_several_paths_give_several_answers(folder, run):
    found = json.loads(run("inspect", folder / "base", folder / "a" / "model.safetensors", "--json")[1])
    assert [Path(one["path"]).name for one in found] == ["base", "model.safetensors"]
    assert run("inspect", folder / "a", "--limit", "1", folder / "b")[1].count("... 3 more") == 2


def test_inspect_of_nothing_is_3(tmp_path, run):
    code, out, err = run("inspect", tmp_path / "none")
    assert (code, out) == (3, "") and err.startswith("peta-fast: CheckpointError: ")


DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int64, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_statistics_are_those_of_fp64(dtype, tmp_path, run):
    values = torch.tensor([[-3.0, 0.5, 0.0], [7.0, -0.0, 1.5]]) if dtype.is_floating_point else torch.arange(6)
    stored = (values if dtype.is_signed or dtype is torch.uint8 else values > 2).to(dtype)
    save_torch_file({"x": stored}, tmp_path / "x.safetensors")
    found = json.loads(run("inspect", tmp_path / "x.safetensors", "--stats", "--json")[1])["tensors"][0]
    exact = stored.double()
    assert (found["min"], found["max"]) == (exact.min().item(), exact.max().item())
    assert found["mean"] == pytest.approx(exact.mean().item(), rel=1e-15)
    assert found["norm"] == pytest.approx(exact.norm().item(), rel=1e-15)
    assert (found["zeros"], found["nonfinite"]) == (int((exact == 0).sum()), 0)


@pytest.mark.parametrize("signs", [(1, 1), (-1, -1), (-1, 1)], ids=["positive", "negative", "both"])
def test_extremes_of_one_sign(signs):
    values = np.array([1.5, 2.5, 0.25, 8.0], np.float32) * np.resize(signs, 4).astype(np.float32)
    found = statistics(Buffer.from_array(values, "F32"))
    assert (found.min, found.max) == (values.min(), values.max())


@pytest.mark.parametrize("dtype", ["BF16", "F32", "F64", "F8_E5M2"])
def test_nonfinite_values_are_counted(dtype, tmp_path):
    torch_dtype = {"BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "F8_E5M2": torch.float8_e5m2}
    stored = torch.tensor([1.0, math.inf, math.nan, -math.inf, 2.0]).to(torch_dtype[dtype])
    raw = stored.view(torch.uint8).numpy()
    assert statistics(Buffer.from_array(raw, dtype)).nonfinite == 3


def test_statistics_of_an_empty_tensor(tmp_path, run):
    path = write_file(tmp_path / "x.safetensors", x=np.zeros((0, 3), np.float32), y=np.float32([1]))
    code, out, _ = run("inspect", path, "--stats", "--json")
    found = next(t for t in json.loads(out)["tensors"] if t["name"] == "x")
    assert code == 0 and found["min"] is None and (found["norm"], found["zeros"]) == (0, 0)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu])
def test_every_code_of_the_8_bit_floats(dtype):
    name = {torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.float8_e8m0fnu: "F8_E8M0"}[dtype]
    codes = np.arange(256, dtype=np.uint8)
    expected = torch.from_numpy(codes).view(dtype).float().numpy()
    np.testing.assert_array_equal(_checkpoints.values(Buffer.from_array(codes, name)), expected)


def test_bfloat16_as_numbers():
    stored = torch.randn(1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = _checkpoints.values(Buffer.from_array(stored.view(torch.uint16).numpy(), "BF16"))
    np.testing.assert_array_equal(found, stored.float().numpy())


# diff


def test_equal_checkpoints_are_0(folder, run):
    write_model(folder / "again", **toy(0))
    code, out, err = run("diff", folder / "base", folder / "again")
    assert (code, err) == (0, "")
    assert out == "4 tensors equal, 0 only in one, 0 of another shape or dtype, 0 with other values\n"


def test_a_sharded_checkpoint_equals_the_whole(folder, run):
    run("merge", folder / "ties.yml", folder / "whole")
    run("merge", folder / "ties.yml", folder / "sharded", "--max-shard-size", "600")
    assert len(list((folder / "sharded").glob("*.safetensors"))) == 3
    assert run("diff", folder / "whole", folder / "sharded")[0] == 0


def test_other_values_are_1_with_norms_and_the_first_place(folder, run):
    changed = toy(0)
    changed[LAST][3, 5] += 3.0
    changed[LAST][7, 0] -= 4.0
    write_model(folder / "changed", **changed)
    code, out, _ = run("diff", folder / "base", folder / "changed", "--json")
    found = json.loads(out)
    assert code == 1 and not found["same"] and found["equal_tensors"] == 3
    (one,) = found["differing"]
    before = toy(0)[LAST].astype(np.float64)
    delta = before - changed[LAST].astype(np.float64)
    assert (one["name"], one["elements"], one["index"]) == (LAST, 2, [3, 5])
    assert (one["a"], one["b"]) == (float(before[3, 5]), float(changed[LAST][3, 5]))
    one_rounding = 2.0**-24
    assert one["norm"] == pytest.approx(np.linalg.norm(delta), rel=one_rounding)
    assert one["relative"] == pytest.approx(np.linalg.norm(delta) / np.linalg.norm(before), rel=one_rounding)
    assert one["largest"] == pytest.approx(np.abs(delta).max(), rel=one_rounding)
    text = run("diff", folder / "base", folder / "changed")[1]
    assert re.search(rf"^{re.escape(LAST)} +2 +5 .* \[3, 5\]: ", text, re.M)


def test_names_shapes_and_dtypes_that_differ_are_told(tmp_path, run):
    ones = np.ones((2, 3), np.float32)
    a = write_file(tmp_path / "a.safetensors", only_a=ones, shape=ones, dtype=ones, same=ones)
    half = ones.astype(np.float16)
    b = write_file(tmp_path / "b.safetensors", only_b=ones, shape=ones.T.copy(), dtype=half, same=ones)
    code, out, _ = run("diff", a, b, "--json")
    found = json.loads(out)
    assert code == 1 and (found["only_in_a"], found["only_in_b"]) == (["only_a"], ["only_b"])
    unlike = {one["name"]: (one["a"], one["b"]) for one in found["unlike"]}
    assert unlike == {"shape": ("float32 [2, 3]", "float32 [3, 2]"), "dtype": ("float32 [2, 3]", "float16 [2, 3]")}
    assert (found["differing"], found["equal_tensors"]) == ([], 1)
    text = run("diff", a, b)[1]
    assert re.search(rf"^only_b +only in {b}$", text, re.M)
    assert re.search(r"^shape +float32 \[2, 3\] +float32 \[3, 2\]$", text, re.M)
    assert text.endswith("1 tensors equal, 2 only in one, 2 of another shape or dtype, 0 with other values\n")


@pytest.mark.parametrize(
    ("a", "b", "tolerance", "code"),
    [
        ([1.0, 2.0], [1.0, 2.25], None, 1),
        ([1.0, 2.0], [1.0, 2.25], "0.25", 0),
        ([1.0, 2.0], [1.0, 2.25], "0.2", 1),
        ([0.0], [-0.0], None, 1),
        ([0.0], [-0.0], "0", 0),
        ([math.nan], [math.nan], "0", 0),
        ([math.nan], [1.0], "1e9", 1),
        ([math.inf], [math.inf], "0", 0),
        ([math.inf], [-math.inf], "1e9", 1),
    ],
)
def test_tolerance(a, b, tolerance, code, tmp_path, run):
    paths = [write_file(tmp_path / f"{n}.safetensors", x=np.float32(v)) for n, v in (("a", a), ("b", b))]
    options = [] if tolerance is None else ["--tolerance", tolerance]
    found, out, err = run("diff", *paths, *options, "--json")
    assert (found, err) == (code, "")
    json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_a_difference_in_a_later_tile_is_found(tmp_path, run, monkeypatch):
    monkeypatch.setattr(_checkpoints, "TILE", 7)
    a = np.arange(60, dtype=np.int64).reshape(5, 12)
    b = a.copy()
    b[3, 4] = -1
    b[4, 11] = 60
    paths = [write_file(tmp_path / f"{n}.safetensors", x=v) for n, v in (("a", a), ("b", b))]
    (one,) = json.loads(run("diff", *paths, "--json")[1])["differing"]
    assert (one["index"], one["a"], one["b"], one["elements"], one["largest"]) == ([3, 4], 40, -1, 2, 41)


def test_scalars_and_bfloat16_are_compared(tmp_path, run):
    for name, value in (("a", 1.0), ("b", 1.0078125)):
        scalar = torch.tensor(value, dtype=torch.bfloat16)
        save_torch_file({"x": scalar, "y": torch.ones(3).bfloat16()}, tmp_path / f"{name}.safetensors")
    code, out, _ = run("diff", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--json")
    (one,) = json.loads(out)["differing"]
    assert code == 1 and (one["index"], one["a"], one["b"], one["norm"]) == ([], 1.0, 1.0078125, 0.0078125)


def test_a_tied_tensor_equals_its_copy(tmp_path, run):
    ones = np.ones(4, np.float32)
    tied, copied = tmp_path / "tied.safetensors", tmp_path / "copied.safetensors"
    save_file({"embed": ones}, tied, metadata={"head": "embed"})
    save_file({"embed": ones, "head": ones.copy()}, copied)
    assert run("diff", tied, copied)[0] == 0
    save_file({"embed": ones, "head": 2 * ones}, copied)
    assert run("diff", tied, copied)[0] == 1


def test_diff_with_nothing_is_3_not_1(folder, run):
    assert run("diff", folder / "base", folder / "none")[0] == 3


# verify


@pytest.fixture
def merged(folder, run):
    assert run("merge", folder / "linear.yml", folder / "out")[0] == 0
    return folder / "out"


def change_byte(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def faults(out: str) -> dict[str, list[str]]:
    """check -> problems, of those that found any."""
    return {check["check"]: check["problems"] for check in json.loads(out)["checks"] if check["problems"]}


def test_a_merged_checkpoint_is_sound(merged, run):
    code, out, err = run("verify", merged)
    assert (code, err) == (0, "") and all(line.startswith("ok ") for line in out.splitlines())
    assert "checksums: as the journal has them" in out
    found = json.loads(run("verify", merged, "--json")[1])
    assert found["sound"] and len(found["checks"]) == 5


def test_a_changed_byte_is_found_by_its_checksum(merged, run):
    change_byte(merged / "model.safetensors", -20)
    code, out, _ = run("verify", merged, "--json")
    assert code == 1 and list(faults(out)) == ["checksums"]
    assert run("verify", merged)[1].count("FAULT  checksums: model.safetensors: bytes ") == 1


def test_a_checkpoint_of_others_has_no_checksums(folder, run):
    code, out, _ = run("verify", folder / "base")
    assert code == 0 and f"ok     checksums: none known, there is no {JOURNAL}" in out


def test_a_file_cut_off_is_found(merged, run):
    file = merged / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    code, out, err = run("verify", merged, "--json")
    assert (code, err) == (1, "") and "truncated" in faults(out)["headers"][0]


def test_nan_is_found_unless_it_is_allowed(folder, run):
    path = write_file(folder / "x.safetensors", fine=np.ones(3), odd=np.float32([1, math.nan, math.inf]))
    code, out, _ = run("verify", path)
    assert code == 1 and "FAULT  values: 'odd' holds 2 values that are NaN or infinite" in out and "'fine'" not in out
    assert run("verify", path, "--allow-nonfinite")[0] == 0


def test_an_unfinished_merge_is_found(merged, run):
    (merged / "model-00002-of-00002.safetensors.partial").write_bytes(b"")
    code, out, _ = run("verify", merged)
    assert code == 1 and "FAULT  finished: model-00002-of-00002.safetensors.partial is left" in out


def test_a_missing_shard_is_found(folder, run):
    run("merge", folder / "ties.yml", folder / "out", "--max-shard-size", "600")
    (folder / "out" / "model-00002-of-00003.safetensors").unlink()
    code, out, _ = run("verify", folder / "out", "--json")
    assert code == 1 and "model-00002-of-00003.safetensors" in faults(out)["headers"][0]


def test_what_the_safetensors_library_refuses_is_found(folder, run, monkeypatch):
    import safetensors

    def refuse(file, framework):
        raise safetensors.SafetensorError("InvalidHeader")

    monkeypatch.setattr(safetensors, "safe_open", refuse)
    code, out, _ = run("verify", folder / "base", "--json")
    assert code == 1 and "InvalidHeader" in faults(out)["loading"][0]


def test_a_torch_file_is_verified_without_the_safetensors_library(tmp_path, run):
    torch.save({"x": torch.ones(3)}, tmp_path / "pytorch_model.bin")
    code, out, _ = run("verify", tmp_path)
    assert code == 0 and "ok     loading: no safetensors file" in out


def test_verify_of_nothing_is_3_not_1(tmp_path, run):
    assert run("verify", tmp_path / "none")[0] == 3
