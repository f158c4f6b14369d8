"""Statistics that are missing, foreign, misshapen or not finite: said by name, before anything is written."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from solved_families import Described, full, models, save_all, statistics

import peta_fast as pf

METHODS = ("fisher", "regmean", "mats")


def merge(states, collected, method="regmean", base=None, **options):
    return pf.merge_state_dicts(base, states, method=method, statistics=collected, **options)


def changed(collected, task: int = 1, drop=(), **new):
    """A copy in which one task's statistics lack some keys and have others; "__" stands for a dot."""
    found = [dict(c) for c in collected]
    for key in drop:
        del found[task][key]
    found[task].update({key.replace("__", "."): t for key, t in new.items()})
    return found


@pytest.mark.parametrize("method", METHODS)
def test_statistics_are_needed(method):
    with pytest.raises(pf.RecipeError, match="statistics"):
        pf.merge_state_dicts(None, models(), method=method)


@pytest.mark.parametrize("operator", ["diagonal", "regmean", "kfac", "block"])
def test_one_model_without_a_file(operator, tmp_path):
    recipe = save_all(tmp_path, models(), statistics())
    del recipe["models"][1]["parameters"]["statistics"]
    with pytest.raises(
        pf.RecipeError, match=f"operator {operator} needs 'statistics' of every model; model 1 has none"
    ):
        pf.merge({"method": "mats", "parameters": {"operator": operator}, **recipe}, tmp_path / "out")


def test_a_file_that_is_not_there(tmp_path):
    recipe = save_all(tmp_path, models(), statistics())
    (tmp_path / "b.stats.safetensors").unlink()
    with pytest.raises(pf.CheckpointError, match="b.stats.safetensors"):
        pf.merge({"method": "regmean", **recipe}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_that_one_model_lacks(method):
    collected = statistics()
    dropped = [k for k in collected[0] if k.startswith("lm_head")]
    with pytest.raises(pf.CompatibilityError, match="statistics 1: lacks 'lm_head.*', which statistics 0 has"):
        merge(models(), changed(collected, drop=dropped), method)


def test_a_key_of_no_tensor():
    collected = changed(statistics(), layers__7__fc__input_gram=torch.ones(21))
    with pytest.raises(pf.CompatibilityError, match="'layers.7.fc.input_gram' belongs to no tensor of its model"):
        merge(models(), collected)


@pytest.mark.parametrize(
    "key, tensor, message",
    [
        ("lm_head.input_gram", torch.ones(21), r"F32 \[21\], expected F32 \[15\] for a tensor of \[11, 5\]"),
        ("lm_head.input_gram", torch.ones(5, 5), r"F32 \[5, 5\], expected F32 \[15\]"),
        ("lm_head.input_gram", torch.ones(15).half(), r"F16 \[15\], expected F32 \[15\]"),
    ],
    ids=["another side", "not packed", "half"],
)
def test_a_gram_that_does_not_fit(key, tensor, message):
    with pytest.raises(pf.CompatibilityError, match=message):
        merge(models(), changed(statistics(), **{key.replace(".", "__"): tensor}))


def test_a_fisher_that_does_not_fit():
    collected = changed(statistics(), lm_head__weight__fisher=torch.ones(5, 11))
    with pytest.raises(pf.CompatibilityError, match=r"F32 \[5, 11\], expected F32 \[11, 5\]"):
        merge(models(), collected, "fisher")


def test_statistics_of_which_the_method_can_use_nothing():
    grams = [{k: t for k, t in s.items() if k.endswith("_gram")} for s in statistics()]
    with pytest.raises(pf.CompatibilityError, match="no tensor has what fisher solves with"):
        merge(models(), grams, "fisher")


@pytest.mark.parametrize("method, key", [("fisher", "embed.weight.fisher"), ("mats", "lm_head.output_gram")])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_statistics_that_are_not_finite(method, key, value, tmp_path):
    collected = statistics()
    collected[1][key].view(-1)[3] = value
    with pytest.raises(pf.CheckpointError, match=f"statistics 1: '{key}': expected finite values, got 1"):
        merge(models(), collected, method)
    recipe = save_all(tmp_path, models(), collected)
    with pytest.raises(pf.CheckpointError, match=f"b.stats.safetensors: '{key}'"):
        pf.merge({"method": method, **recipe}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_gram_that_is_none():
    collected = statistics()
    for found in collected:
        gram = torch.from_numpy(-full(found["lm_head.input_gram"])).float()
        gram.diagonal().abs_()
        gram[0, 1] = gram[1, 0] = 50
        found["lm_head.input_gram"] = gram[torch.triu_indices(5, 5).unbind()]
    with pytest.raises(pf.CheckpointError, match="lm_head.weight: statistics: expected a positive semi-definite"):
        merge(models(), collected, off_diagonal=1.0)


def test_singular_grams_are_solved_and_say_so():
    """One row a task in five dimensions: what they do not determine stays near the average."""
    states, collected, rows = models(), statistics(), []
    for t, found in enumerate(collected):
        x = torch.randn(1, 5, generator=torch.Generator().manual_seed(t))
        rows.append(x)
        found["lm_head.input_gram"] = (x.T @ x)[torch.triu_indices(5, 5).unbind()]
    notes: dict = {}
    merged = merge(states, collected, off_diagonal=1.0, notes=notes)["lm_head.weight"]
    assert notes["lm_head.weight"]["ridge"] == pytest.approx(1e-5) and notes["layers.0.fc.weight"]["ridge"] == 0
    for state, x in zip(states, rows, strict=True):  # three rows can all be met
        torch.testing.assert_close(merged @ x[0], state["lm_head.weight"] @ x[0], rtol=0, atol=2e-3)
    assert merged.abs().max() < 20
    with pytest.raises(pf.CheckpointError, match="the sum of the Gram matrices is singular"):
        merge(states, collected, off_diagonal=1.0, compat="mats")


def test_the_base_where_it_is_the_start():
    with pytest.raises(pf.RecipeError, match="mats needs a base_model with these settings"):
        merge(models(), statistics(), "mats", init="pretrained")


def test_a_start_that_lacks_a_tensor_or_has_another_shape(tmp_path):
    start = models(4)[3]
    with pytest.raises(pf.CompatibilityError, match="init: lacks 'lm_head.weight', which the merge is to begin from"):
        merge(models(), statistics(), "mats", init={n: t for n, t in start.items() if "lm_head" not in n})
    with pytest.raises(pf.CompatibilityError, match=r"'lm_head.weight' is \[5, 11\], expected \[11, 5\]"):
        merge(models(), statistics(), "mats", init={n: t.T if t.dim() == 2 else t for n, t in start.items()})
    with pytest.raises(pf.CheckpointError, match="nowhere"):
        merge(models(), statistics(), "mats", init=str(tmp_path / "nowhere"))


@pytest.mark.parametrize("method", METHODS)
def test_weights_that_leave_nothing(method):
    with pytest.raises(pf.RecipeError, match="above 0 for one model at least"):
        merge(models(), statistics(), method, weight=0.0)
    with pytest.raises(pf.RecipeError, match="at least 0"):
        merge(models(), statistics(), method, weight=[1, -1, 1])


def test_a_fisher_is_no_negative_number():
    collected = statistics()
    collected[1]["lm_head.weight.fisher"][2, :3] *= -1
    with pytest.raises(pf.CheckpointError, match="'lm_head.weight.fisher': expected means of squares, got 3 negative"):
        merge(models(), collected, "fisher")


def test_the_norms_that_fusion_bench_divides_by():
    with pytest.raises(pf.CheckpointError, match="needs 'fisher_norm' in the metadata"):
        merge(models(), statistics(), "fisher", compat="fusion_bench")
    with pytest.raises(pf.CheckpointError, match="'fisher_norm' must be a number, got 'large'"):
        merge(models(), [Described(s, fisher_norm="large") for s in statistics()], "fisher", compat="fusion_bench")


@pytest.mark.parametrize("text", ["lm_head", "3"])
def test_a_layout_that_is_no_list(text):
    with pytest.raises(pf.CheckpointError, match="'transposed' must be a JSON list"):
        merge(models(), [Described(s, transposed=text) for s in statistics()])


def test_a_killed_merge_is_not_resumed_with_other_statistics(tmp_path):
    recipe = {"method": "regmean", **save_all(tmp_path, models(), statistics())}
    pf.merge(recipe, tmp_path / "out")
    pf.merge(recipe, tmp_path / "out", resume=True)
    save_file(statistics()[1], tmp_path / "a.stats.safetensors")
    with pytest.raises(pf.ResourceError, match="recipe, inputs or options differ"):
        pf.merge(recipe, tmp_path / "out", resume=True)
