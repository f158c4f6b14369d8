"""Checkpoints of what was trained alone: everything else is the base's, in memory and on disk."""

from __future__ import annotations

import pytest
import torch
from command_line import runner
from families import assert_same_bits, family
from model_folders import load, save_family, save_model
from safetensors import safe_open

import peta_fast as pf
from peta_fast.errors import CheckpointError, CompatibilityError, RecipeError
from peta_fast.formats.trained_only import METADATA
from peta_fast.nn import trained_difference
from peta_fast.plan import FROZEN, make_plan
from peta_fast.recipe import load_recipe

PROJECTIONS = "self_attn"


def trained_alone(base, models):
    """(whole models that moved in their projections alone, the same without what is frozen)"""
    whole = [{n: m[n] if PROJECTIONS in n else base[n].clone() for n in base} for m in models]
    return whole, [pf.TrainedTensors({n: t for n, t in m.items() if PROJECTIONS in n}) for m in whole]


@pytest.fixture
def folders(tmp_path):
    """base and whole models as folders `base`, `a`, `b`; `a_only`, `b_only` hold the trained tensors."""
    base, models = save_family(tmp_path)
    whole, alone = trained_alone(base, models)
    for name, state, part in zip("ab", whole, alone, strict=True):
        save_model(tmp_path / name, state)
        pf.save_trained(part, tmp_path / f"{name}_only")
    return tmp_path, base, whole, alone


def recipe(folder, names, method="task_arithmetic", **parameters):
    return {
        "method": method, "base_model": str(folder / "base"), "models": [{"model": str(folder / n)} for n in names],
        "parameters": parameters,
    }  # fmt: skip


METHODS = {
    "task_arithmetic": {"weight": 0.7},
    "ties": {"weight": 0.5, "density": 0.4},
    "dare_ties": {"weight": 0.5, "density": 0.4},
    "breadcrumbs": {"weight": 0.5, "density": 0.6},
    "awd": {"weight": 0.9},
}


@pytest.mark.parametrize("method", METHODS)
def test_the_merge_is_that_of_whole_checkpoints(folders, tmp_path, method):
    folder, base, whole, alone = folders
    expected = pf.merge_state_dicts(base, whole, method=method, **METHODS[method])
    assert any((expected[n] != base[n]).any() for n in base)
    in_memory = pf.merge_state_dicts(base, alone, method=method, **METHODS[method])
    pf.merge(recipe(folder, ("a_only", "b_only"), method, **METHODS[method]), tmp_path / "out")
    assert_same_bits(in_memory, expected)
    assert_same_bits(load(tmp_path / "out"), expected)


def test_a_trained_and_a_whole_checkpoint_merge_with_each_other(folders):
    _, base, whole, alone = folders
    everywhere = {n: t + 0.5 for n, t in base.items()}
    expected = pf.merge_state_dicts(base, [whole[0], everywhere], method="ties", weight=1, density=0.5)
    actual = pf.merge_state_dicts(base, [alone[0], everywhere], method="ties", weight=1, density=0.5)
    assert_same_bits(actual, expected)


def test_frozen_tensors_are_copied_and_nothing_else_is_read_of_them(folders):
    folder, base, _, alone = folders
    plan = make_plan(load_recipe(recipe(folder, ("a_only", "b_only"), weight=1.0)))
    frozen = {t.name for t in plan.tensors if t.reason == FROZEN}
    assert frozen == {n for n in base if PROJECTIONS not in n}
    trained_bytes = sum(t.nbytes for t in alone[0].values())
    assert plan.bytes_read == 3 * trained_bytes + sum(base[n].nbytes for n in frozen)


def test_a_merge_in_place_keeps_the_base_s_own_tensors(folders):
    _, base, whole, alone = folders
    live = {n: t.clone() for n, t in base.items()}
    merged = pf.merge_state_dicts(live, alone, method="task_arithmetic", weight=0.5, out=live)
    assert_same_bits(merged, pf.merge_state_dicts(base, whole, method="task_arithmetic", weight=0.5))
    assert all(merged[n] is live[n] for n in live)


def test_one_threshold_over_the_model_counts_what_was_trained_alone(folders):
    """With what is frozen among them, the zeros would count as the smallest of all."""
    _, base, whole, alone = folders
    settings = {"method": "ties", "weight": 1.0, "density": 0.3, "trim_scope": "model"}
    part = pf.merge_state_dicts(base, alone[:1], **settings)
    flat = torch.cat([(whole[0][n].float() - base[n].float()).flatten() for n in base if PROJECTIONS in n])
    kept = torch.cat([(part[n] != base[n]).flatten() for n in base if PROJECTIONS in n])
    threshold = flat.abs().sort(descending=True).values[int(0.3 * flat.numel()) - 1]
    assert torch.equal(kept, flat.abs() >= threshold)
    whole_kept = sum(int((t != base[n]).sum()) for n, t in pf.merge_state_dicts(base, whole[:1], **settings).items())
    assert whole_kept > 2 * int(kept.sum())


def test_the_output_can_hold_what_was_trained_alone(folders, tmp_path, capsys):
    folder, base, whole, alone = folders
    settings = recipe(folder, ("a_only", "b_only"), "ties", weight=1.0, density=0.5)
    pf.merge(settings, tmp_path / "out", trained_only=True)
    expected = pf.merge_state_dicts(base, whole, method="ties", weight=1.0, density=0.5)
    assert_same_bits(load(tmp_path / "out"), {n: expected[n] for n in alone[0]})
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as opened:
        assert METADATA.items() <= opened.metadata().items()
    again = pf.merge(recipe(folder, ("../out",), weight=1.0) | {"models": [{"model": str(tmp_path / "out")}]},
                     tmp_path / "whole")  # fmt: skip
    assert again.tensors == len(base)
    import yaml

    (tmp_path / "r.yml").write_text(yaml.safe_dump(settings))
    code, _, err = runner(capsys)("merge", tmp_path / "r.yml", tmp_path / "cli", "--trained-only", "-q")
    assert code == 0, err
    assert_same_bits(load(tmp_path / "cli"), load(tmp_path / "out"))


def test_frozen_tensors_take_the_output_s_dtype(folders):
    _, base, whole, alone = folders
    merged = pf.merge_state_dicts(base, alone, method="task_arithmetic", weight=0.5, dtype="bfloat16")
    assert_same_bits(merged, pf.merge_state_dicts(base, whole, method="task_arithmetic", weight=0.5, dtype="bfloat16"))


def test_buffers_and_integers_are_the_base_s():
    base, models = family(2)
    base |= {"bn.running_mean": torch.ones(3), "ids": torch.arange(4)}
    part = [pf.TrainedTensors({"embed.weight": m["embed.weight"]}) for m in models]
    merged = pf.merge_state_dicts(base, part, method="task_arithmetic", weight=0.5)
    assert all(torch.equal(merged[n], base[n]) for n in base if n != "embed.weight")
    assert not torch.equal(merged["embed.weight"], base["embed.weight"])


@pytest.mark.parametrize("method", ["linear", "slerp"])
def test_methods_without_a_base_refuse_them(folders, method):
    _, base, _, alone = folders
    weight = {"weight": 0.5} if method == "linear" else {"t": 0.5}
    with pytest.raises(CompatibilityError, match="has '.*which model 0 lacks"):
        pf.merge_state_dicts(None, [alone[0], base], method=method, **weight)


def test_a_missing_tensor_in_an_ordinary_checkpoint_stays_a_fault(folders):
    _, base, _, alone = folders
    with pytest.raises(CompatibilityError, match="model 0: lacks"):
        pf.merge_state_dicts(base, [dict(alone[0])], method="task_arithmetic", weight=1.0)


def test_a_name_that_the_base_lacks_stays_a_fault(folders):
    _, base, _, alone = folders
    alone[0]["new.weight"] = torch.ones(2)
    with pytest.raises(CompatibilityError, match="'new.weight', which base lacks"):
        pf.merge_state_dicts(base, alone, method="task_arithmetic", weight=1.0)


def test_an_output_of_trained_tensors_wants_such_inputs(folders, tmp_path):
    folder, *_ = folders
    with pytest.raises(RecipeError, match="trained tensors alone, got .*b, which holds all tensors"):
        pf.merge(recipe(folder, ("a_only", "b"), weight=1.0), tmp_path / "out", trained_only=True)
    assert not (tmp_path / "out").exists()


def test_the_difference_to_the_base_is_what_was_trained(folders):
    _, base, whole, alone = folders
    assert_same_bits(trained_difference(base, whole[0]), alone[0])
    with pytest.raises(RecipeError, match="every tensor is the base's own"):
        trained_difference(base, {n: t.clone() for n, t in base.items()})
    with pytest.raises(CompatibilityError, match="is in one alone"):
        trained_difference(base, {**whole[0], "more": torch.ones(1)})
    with pytest.raises(CompatibilityError, match="'model.norm.weight' is"):
        trained_difference(base, {**whole[0], "model.norm.weight": torch.ones(1)})


def test_what_was_trained_is_extracted_from_whole_checkpoints(folders, tmp_path):
    folder, base, whole, alone = folders
    assert set(pf.extract_trained(folder / "base", folder / "a", tmp_path / "part")) == set(alone[0])
    assert_same_bits(load(tmp_path / "part"), alone[0])
    assert (tmp_path / "part" / "config.json").read_text() == (folder / "a" / "config.json").read_text()
    with pytest.raises(RecipeError, match="every tensor is the base's own"):
        pf.extract_trained(folder / "base", folder / "base", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_what_cannot_be_trained_tensors_is_refused(folders, tmp_path):
    folder, base, whole, alone = folders
    model = torch.nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match="expected a checkpoint of trained tensors alone"):
        pf.load_trained(model, folder / "a")
    with pytest.raises(CompatibilityError, match="is not in the model"):
        pf.load_trained(model, folder / "a_only")
    pf.save_trained(pf.TrainedTensors({"weight": torch.ones(3, 2)}), tmp_path / "wide")
    with pytest.raises(CompatibilityError, match=r"'weight' is \[3, 2\], in the model \[2, 2\]"):
        pf.load_trained(model, tmp_path / "wide")
    with pytest.raises(CheckpointError, match="weight: expected finite values, got 1 NaN or inf"):
        pf.save_trained(pf.TrainedTensors({"weight": torch.tensor([1.0, float("inf")])}), tmp_path / "broken")
    assert not (tmp_path / "broken").exists()
    with pytest.raises(RecipeError, match="every parameter is frozen"):
        pf.save_trained(model.requires_grad_(False), tmp_path / "broken")
