"""peta_fast.merge when something is wrong: an error that says it, and nothing lost, replaced or left behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_files import entry, safetensors_bytes
from model_folders import files_of, load, save_family, save_model, shapes
from safetensors.torch import save_file

import peta_fast
from peta_fast import _output
from peta_fast.errors import CheckpointError, CompatibilityError, PetaFastError, RecipeError, ResourceError
from peta_fast.formats import open_checkpoint, safetensors_writer
from peta_fast.journal import JOURNAL, verify

EXIT_CODES = {RecipeError: 2, CheckpointError: 3, CompatibilityError: 4, ResourceError: 5}
SMALL = {"max_memory": 10 << 20}
LARGE = {"model.layers.0.up.weight": (300, 800), "model.layers.1.up.weight": (300, 800), "model.norm.weight": (800,)}
"""With little memory these are made in several slabs."""


@pytest.fixture
def family(tmp_path):
    """Folders base, a and b, to be spoiled."""
    save_family(tmp_path)
    return tmp_path


@pytest.fixture
def large(tmp_path):
    save_family(tmp_path, names=LARGE)
    return tmp_path


def merge(folder, out=None, models=("a", "b"), **keywords):
    keywords = {"method": "ties", "density": 0.5, **keywords}
    named = {"base": folder / "base", "models": [folder / name for name in models]}
    return peta_fast.merge(out=out or folder / "out", **named, **keywords)


def refused(error: type[PetaFastError], *words: str, folder, **keywords) -> str:
    """The merge must raise `error` with all of `words` and the exit code of its class."""
    with pytest.raises(error) as caught:
        merge(folder, **keywords)
    message = str(caught.value)
    missing = [word for word in words if word not in message]
    assert not missing, f"{message!r} does not say {missing}"
    assert caught.value.exit_code == EXIT_CODES[error]
    return message


def set_value(folder, name: str, index: int, value: float) -> None:
    """Changes one element of one tensor of a saved model."""
    state = load(folder)
    state[name].view(-1)[index] = value
    save_model(folder, state)


# Inputs


def truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def overlapping(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(safetensors_bytes({"one": entry(0, 8), "two": entry(4, 12)}, bytes(12)))


def without_a_shard(folder: Path) -> None:
    save_sharded(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()


def with_an_index_of_absent_tensors(folder: Path) -> None:
    index = json.loads(save_sharded(folder).read_text())
    index["weight_map"]["ghost.weight"] = "model-00001-of-00003.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def save_sharded(folder: Path) -> Path:
    state = load(folder)
    (folder / "model.safetensors").unlink()
    save_model(folder, state, shards=3)
    return folder / "model.safetensors.index.json"


def with_another_shape(folder: Path) -> None:
    save_model(folder, {**load(folder), "model.norm.weight": torch.ones(5)})


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


DAMAGES = [
    (truncated, CheckpointError, ["a/model.safetensors", "truncated"]),
    (overlapping, CheckpointError, ["a/model.safetensors", "'two'", "inside 'one'"]),
    (without_a_shard, CheckpointError, ["model.safetensors.index.json", "model-00002-of-00003.safetensors"]),
    (with_an_index_of_absent_tensors, CheckpointError, ["model-00001-of-00003.safetensors", "'ghost.weight'"]),
    (with_another_shape, CompatibilityError, ["'model.norm.weight'", "[5] in", "[24] in"]),
    (without_weights, CheckpointError, ["/a:", "expected weights"]),
]


@pytest.mark.parametrize("damage, error, words", DAMAGES, ids=[d[0].__name__ for d in DAMAGES])
def test_a_damaged_input_is_named_and_nothing_is_left(family, damage, error, words):
    damage(family / "a")
    refused(error, *words, folder=family)
    assert not (family / "out").exists()
    (family / "out").mkdir()
    refused(error, *words, folder=family)
    assert list((family / "out").iterdir()) == []


@pytest.mark.parametrize("keywords", [{"method": "tise"}, {"densiti": 0.5}, {"density": 1.5}, {"seed": -1}])
def test_what_the_recipe_gets_wrong_is_said_before_any_work(family, keywords):
    refused(RecipeError, folder=family, **keywords)
    assert not (family / "out").exists()


def test_a_tokenizer_or_template_that_is_not_there_is_refused_before_any_work(family, monkeypatch):
    refused(CheckpointError, "nowhere", folder=family, tokenizer_source="/nowhere")
    refused(CheckpointError, "expected a tokenizer's files", folder=family, tokenizer_source=str(family / "b"))
    refused(RecipeError, "Jinja text", "'chatml'", folder=family, chat_template="chatml")
    (family / "base" / "tokenizer_config.json").write_text("[1]")
    refused(CheckpointError, "tokenizer_config.json", "a JSON object", folder=family, chat_template="{{ x }}")
    assert not (family / "out").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("model", ["base", "a", "b"])
def test_what_is_not_finite_is_named_and_nothing_is_published(large, model, value):
    set_value(large / model, "model.layers.1.up.weight", 120_000, value)
    for options in ({}, SMALL, {**SMALL, "max_shard_size": 1000}):
        refused(CheckpointError, f"{model}/model.safetensors", "'model.layers.1.up.weight'", "got 1 NaN or inf",
                folder=large, **options)  # fmt: skip
        assert not (large / "out").exists()


def test_the_shard_that_holds_nan_is_named_and_so_is_a_layer_s_own_number(family):
    set_value(family / "a", "model.layers.1.mlp.up_proj.weight", 3, float("nan"))
    save_sharded(family / "a")
    index = json.loads((family / "a" / "model.safetensors.index.json").read_text())
    shard = index["weight_map"]["model.layers.1.mlp.up_proj.weight"]
    refused(CheckpointError, f"a/{shard}", folder=family)
    source = {"model": str(family / "a"), "layer_range": [1, 2]}
    with pytest.raises(CheckpointError, match=r"a/model.*'model.layers.1.mlp.up_proj.weight' for: 'model.layers.0.mlp"):
        peta_fast.merge({"method": "passthrough", "slices": [{"sources": [source]}]}, family / "out")


def test_nan_in_a_model_of_weight_zero_is_nan_all_the_same(family):
    set_value(family / "b", "lm_head.weight", 0, float("nan"))
    refused(CheckpointError, "b/model.safetensors", folder=family, weight=[1.0, 0.0])
    refused(CheckpointError, "b/model.safetensors", folder=family, density=[0.5, 0.0])


def test_values_that_overflow_the_output_s_dtype_are_refused(family):
    set_value(family / "a", "lm_head.weight", 7, 1e6)
    refused(CheckpointError, "lm_head.weight", "overflow the output's dtype", folder=family, models=["a"],
            dtype="float16", density=1.0)  # fmt: skip


@pytest.mark.parametrize("dtype, pattern", [("float32", 0x7FC00000), ("bfloat16", 0x7FC0), ("float16", 0x7E00)])
def test_allowed_nan_has_one_pattern(family, dtype, pattern):
    state = load(family / "a")
    odd = torch.tensor([0x7FABCDEF, -0x3FFFFF, 0x7F800000], dtype=torch.int32).view(torch.float32)
    state["lm_head.weight"].view(-1)[:3] = odd
    save_model(family / "a", state)
    for method, keys in (("task_arithmetic", {"weight": 0.5}), ("linear", {"weight": 0.5}), ("slerp", {"t": 0.5})):
        base = family / "base" if method == "task_arithmetic" else None
        models, out = [family / "a", family / "b"], family / method
        peta_fast.merge(out=out, method=method, base=base, models=models, dtype=dtype, allow_nonfinite=True, **keys)
        merged = load(out)["lm_head.weight"].view(-1)
        assert merged[:2].isnan().all() and merged[3:].isfinite().all()
        bits = merged[:2].view(torch.int32 if dtype == "float32" else torch.int16)
        assert bits.tolist() == [pattern] * 2, method


# The output folder


def test_what_is_in_the_output_is_not_replaced_without_force(family):
    merge(family)
    before = files_of(family / "out")
    refused(ResourceError, "out: holds a checkpoint already", "--force", folder=family, weight=0.3)
    assert files_of(family / "out") == before and verify(family / "out") == []


@pytest.mark.parametrize("name", ["README.md", "config.json", "pytorch_model.bin", "model.safetensors.index.json"])
def test_a_file_that_the_merge_would_replace_is_not_replaced_without_force(family, name):
    (family / "out").mkdir()
    (family / "out" / name).write_text("precious")
    refused(ResourceError, name, "--force", folder=family)
    assert {n: c.decode() for n, c in files_of(family / "out").items()} == {name: "precious"}


@pytest.mark.parametrize("old, new", [(2000, None), (None, 2000), (2000, 6000)])
def test_force_replaces_a_model_whatever_its_shards_and_leaves_the_rest(family, old, new):
    options = {size: {"max_shard_size": size} if size else {} for size in (old, new)}
    merge(family, family / "fresh", **options[new])
    merge(family, weight=0.1, **options[old])
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json"):
        (family / "out" / name).write_text("old")
    others = {"optimizer.pt": b"state", "notes.txt": b"n", "model.partial": b"p"}
    for name, content in others.items():
        (family / "out" / name).write_bytes(content)
    merge(family, force=True, **options[new])
    assert files_of(family / "out") == files_of(family / "fresh") | others
    assert verify(family / "out") == []


def test_a_forced_merge_that_fails_leaves_the_old_output_as_it_was(large):
    merge(large, weight=0.3)
    before = files_of(large / "out")
    set_value(large / "b", "model.norm.weight", 0, float("nan"))
    refused(CheckpointError, "NaN", folder=large, force=True, **SMALL)
    assert files_of(large / "out") == before and verify(large / "out") == []


def test_an_output_that_is_a_file_is_refused(family):
    (family / "out").write_text("precious")
    for force in (False, True):
        refused(ResourceError, "expected a folder", folder=family, force=force)
    assert (family / "out").read_text() == "precious"


def test_inputs_and_outputs_must_lie_apart(family, monkeypatch):
    masks = {n: torch.ones(s) for n, s in shapes().items()}
    (family / "masks").mkdir()
    save_file(masks, family / "masks" / "model.safetensors")
    masked = {"method": "masked_task_arithmetic", "mask": family / "masks" / "model.safetensors"}
    save_model(family / "words", {"x": torch.ones(1)}, tokenizer_json="{}")
    worded = {"method": "ties", "density": 0.5, "tokenizer_source": str(family / "words")}
    os.symlink(family / "a", family / "link")
    monkeypatch.chdir(family)
    before = files_of(family)
    places = [
        ("base", worded), (family / "a", worded), ("b/merged/deep", worded), ("link", worded), ("link/x", worded),
        ("a/../base/", worded), (".", worded), ("words", worded), (family / "masks", masked), ("a/../masks", masked),
    ]  # fmt: skip
    for out, settings in places:
        with pytest.raises(ResourceError, match="lies inside the input|holds the input"):
            peta_fast.merge(out=out, base=family / "base", models=["a", "b"], force=True, **settings)
    assert files_of(family) == before


def test_a_folder_of_single_weight_files_is_no_place_for_the_output(family, monkeypatch):
    (family / "flat").mkdir()
    for name in ("base", "a"):
        shutil.copy(family / name / "model.safetensors", family / "flat" / f"{name}.safetensors")
    monkeypatch.chdir(family)
    before = files_of(family)
    keywords = {"method": "ties", "base": "flat/base.safetensors", "models": ["flat/a.safetensors"], "force": True}
    for out in ("flat", family / "flat", "flat/a.safetensors"):
        with pytest.raises(ResourceError):
            peta_fast.merge(out=out, **keywords)
    assert files_of(family) == before
    peta_fast.merge(out="flat/merged", **keywords)
    assert set(load(family / "flat" / "merged")) == set(shapes())


# The disk


def test_a_disk_that_is_too_small_is_refused_before_the_first_byte(large, mount_disk):
    refused(ResourceError, "bytes of free disk", "Free some space", folder=large, out=mount_disk("size=4m,rw") / "out")
    assert list((large / "disk").iterdir()) == []


def test_a_disk_that_fills_up_is_an_error_that_says_so_and_leaves_nothing(large, mount_disk, monkeypatch):
    disk = mount_disk("size=4m,rw")
    monkeypatch.setattr(_output, "SLACK", 0)
    monkeypatch.setattr(_output, "free_bytes", lambda path: 1 << 40)
    (disk / "others").write_bytes(bytes(3 << 20))
    refused(ResourceError, "disk/out/model.safetensors", "No space left", folder=large, out=disk / "out", **SMALL)
    assert [p.name for p in disk.iterdir()] == ["others"]


def test_a_read_only_disk_is_an_error_that_says_so(family, mount_disk, monkeypatch):
    disk = mount_disk("size=4m,ro")
    monkeypatch.setattr(_output, "free_bytes", lambda path: 1 << 40)
    refused(ResourceError, "disk/out", "Read-only", folder=family, out=disk / "out")


@pytest.mark.parametrize("call", ["pwrite", "fsync", "replace"])
def test_a_disk_that_fails_on_the_way_leaves_something_to_resume(large, monkeypatch, call):
    merge(large, large / "whole", **SMALL)
    real, calls = getattr(os, call), []

    def failing(*args, **keywords):
        calls.append(call)
        if len(calls) > {"pwrite": 4, "fsync": 2, "replace": 0}[call]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args, **keywords)

    monkeypatch.setattr(safetensors_writer.os, call, failing)
    refused(ResourceError, "out", "No space left", folder=large, **SMALL)
    monkeypatch.undo()
    with pytest.raises(CheckpointError):
        open_checkpoint(large / "out")
    assert (large / "out" / JOURNAL).exists()
    refused(ResourceError, "unfinished merge", "--resume", "--force", folder=large, **SMALL)
    assert merge(large, resume=True, **SMALL).skipped_bytes > 0
    assert files_of(large / "out") == files_of(large / "whole")


def test_an_old_model_that_cannot_be_removed_is_an_error_that_says_so(family, monkeypatch):
    merge(family, weight=0.3)

    def failing(self, missing_ok=False):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(Path, "unlink", failing)
    refused(ResourceError, "out: cannot be completed", "change the permissions", folder=family, force=True)
    monkeypatch.undo()
    merge(family, resume=True)
    merge(family, family / "fresh")
    assert files_of(family / "out") == files_of(family / "fresh")


def test_an_input_that_goes_away_under_way_is_named(family, monkeypatch):
    (family / "base" / "vocab.json").write_text("{}")
    monkeypatch.setattr(_output, "_refuse_inputs", lambda plan, out: (family / "a" / "model.safetensors").unlink())
    refused(CheckpointError, "a/model.safetensors", "cannot be read any more", folder=family)
    assert not (family / "out").exists()
