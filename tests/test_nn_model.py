"""linearize on whole models: which modules, with which settings; switching, adding and undoing adapters."""

from __future__ import annotations

import pytest
import torch
from small_models import base, linearized, stepped, tokens, transformer
from torch import nn

import peta_fast as pf
from peta_fast.errors import CompatibilityError, RecipeError


def layer_names(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, pf.LinearizedLoRALinear)]


def trained(model: nn.Module) -> set[str]:
    return {n for n, p in model.named_parameters() if p.requires_grad}


QV = [f"layers.{i}.{n}" for i in (0, 1) for n in ("q_proj", "v_proj")]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q_proj", "v_proj"], QV),
        (["0.q_proj"], ["layers.0.q_proj"]),
        (r"layers\.1\.(q|v)_proj", QV[2:]),
        (("classifier",), ["classifier"]),
    ],
    ids=["tails", "longer", "expression", "top"],
)
def test_targets_are_chosen_as_peft_chooses_them(targets, expected):
    assert layer_names(pf.linearize(base(), targets)) == expected


def test_all_linear_takes_every_linear():
    assert len(layer_names(pf.linearize(base(), "all-linear"))) == 9


def test_only_the_steps_are_trained_and_the_function_starts_unchanged():
    model = pf.linearize(base(), ["q_proj", "v_proj"], r=4, alpha=8)
    assert trained(model) == {f"{name}.delta_B" for name in QV}
    assert torch.equal(model(tokens()), transformer()(tokens()))


def test_modules_to_save_are_trained_in_full():
    model = pf.linearize(base(), ["q_proj"], modules_to_save=["classifier"])
    assert {"classifier.weight", "classifier.bias"} < trained(model)


def test_rank_and_alpha_patterns_set_single_modules():
    model = pf.linearize(
        base(),
        ["q_proj", "v_proj"],
        r=2,
        alpha=4,
        rank_pattern={"v_proj": 5, r"0\.q_proj": 3},
        alpha_pattern={"v_proj": 10},
    )
    found = {n: (model.get_submodule(n).r, model.get_submodule(n).scaling) for n in QV}
    assert found == {QV[0]: (3, 4 / 3), QV[1]: (5, 2.0), QV[2]: (2, 2.0), QV[3]: (5, 2.0)}


def test_tasks_share_a_point_and_modules_do_not():
    first, second = linearized(), linearized()
    assert torch.equal(first.layers[0].q_proj.A0, second.layers[0].q_proj.A0)
    assert not torch.equal(first.layers[0].q_proj.A0, first.layers[1].q_proj.A0)
    assert not torch.equal(first.layers[0].q_proj.A0, linearized(seed=7).layers[0].q_proj.A0)


def test_a_bf16_model_keeps_its_adapters_in_fp32():
    model = pf.linearize(base().bfloat16(), ["q_proj"])
    assert model.layers[0].q_proj.delta_B.dtype == torch.float32
    assert (
        pf.linearize(base().bfloat16(), ["q_proj"], autocast_adapter_dtype=False).layers[0].q_proj.A0.dtype
        == torch.bfloat16
    )


def test_a_name_that_matches_nothing_is_told_the_nearest():
    with pytest.raises(RecipeError, match=r"no module matches 'v_porj'\nThe nearest Linear modules are 'v_proj'"):
        pf.linearize(base(), ["q_proj", "v_porj"])
    with pytest.raises(RecipeError, match=r"no module matches 'layers\\\.9"):
        pf.linearize(base(), r"layers\.9\..*")


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"target_modules": ["embed"]}, CompatibilityError, "embed: is a Embedding"),
        ({"target_modules": ["layers.0"]}, CompatibilityError, "layers.0: is a Attention, expected nn.Linear"),
        ({"target_modules": None}, RecipeError, "target_modules is missing"),
        ({"r": 0}, RecipeError, "layers.0.q_proj: r is 0"),
        ({"r": 13}, RecipeError, r"r is 13, expected an integer from 1 to 12: the weight is \[12, 12\]"),
        ({"rank_pattern": {"k_proj": 3}}, RecipeError, "'k_proj' matches none of the targeted modules"),
        ({"modules_to_save": ["head"]}, RecipeError, "no module matches 'head'"),
        ({"modules_to_save": ["layers"]}, RecipeError, "'layers' holds the targeted 'layers.0.q_proj'"),
        ({"scope": "network"}, RecipeError, "scope is 'network'"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_what_cannot_be_linearized_is_refused_and_the_model_is_left_alone(arguments, error, match):
    model = base()
    with pytest.raises(error, match=match):
        pf.linearize(model, **({"target_modules": ["q_proj", "v_proj"]} | arguments))
    assert layer_names(model) == [] and torch.equal(model(tokens()), transformer()(tokens()))


def test_a_second_adapter_comes_beside_the_first_and_switches():
    model = linearized()
    first = model(tokens())
    pf.linearize(model, ["q_proj"], r=2, alpha=2, adapter_name="other", seed=9)
    assert torch.equal(model(tokens()), first)
    pf.set_adapter(model, "other")
    assert trained(model) == {f"layers.{i}.q_proj.adapters.other.delta_B" for i in (0, 1)}
    assert torch.equal(model(tokens()), transformer()(tokens()))
    pf.set_adapter(model, "default")
    assert torch.equal(model(tokens()), first)
    with pf.disable_adapter(model):
        assert torch.equal(model(tokens()), transformer()(tokens()))
    with pytest.raises(RecipeError, match="no layer has an adapter 'third'\nThere are default, other"):
        pf.set_adapter(model, "third")


def two_tasks(**second) -> nn.Module:
    """Adapters "default" and "b" at one point, or not."""
    model = linearized()
    settings = {"r": 3, "alpha": 6, "init": "gaussian"} | second
    pf.linearize(model, ["q_proj", "v_proj"], adapter_name="b", **settings)
    pf.set_adapter(model, "b")
    stepped(model, seed=2)
    pf.set_adapter(model, "default")
    return model


def weight_change(layer, name: str) -> torch.Tensor:
    """How merging the adapter changes the weight."""
    layer.set_adapter(name)
    before = layer.weight
    layer.merge()
    changed = layer.weight - before
    layer.unmerge()
    return changed.detach()


def test_adding_adapters_adds_their_steps_and_their_weight_changes():
    model = two_tasks()
    pf.add_adapters(model, {"default": 0.3, "b": -0.5}, "sum")
    a, b, total = (pf.task_vector(model, name) for name in ("default", "b", "sum"))
    assert set(total) == set(a) and len(total) == 8
    for name, step in total.items():
        torch.testing.assert_close(step, 0.3 * a[name] - 0.5 * b[name])
    layer = model.layers[0].q_proj
    point = layer.scaling * (layer.B0 @ layer.A0)
    changes = {name: weight_change(layer, name) - point for name in ("default", "b", "sum")}
    torch.testing.assert_close(changes["sum"], 0.3 * changes["default"] - 0.5 * changes["b"], rtol=1e-12, atol=1e-12)


def test_with_B0_zero_the_sum_is_the_concatenation_of_the_tasks():
    """methods of the paper: the numbers of two tasks on one 2x2 layer, lambda = 0.5."""
    model = pf.linearize(nn.Sequential(nn.Linear(2, 2, bias=False)).double(), ["0"], r=1, alpha=2)
    layer = model[0]
    layer.add_factors("b", layer.factors())
    with torch.no_grad():
        layer.A0.copy_(torch.tensor([[0.5, -0.25]]))
        layer.adapters["b"].A0.copy_(layer.A0)
        layer.delta_B.copy_(torch.tensor([[0.4], [-0.2]]))
        layer.adapters["b"].delta_B.copy_(torch.tensor([[-0.1], [0.5]]))
    pf.add_adapters(model, {"default": 0.5, "b": 0.5}, "both")
    expected = torch.tensor([[0.15, -0.075], [0.15, -0.075]], dtype=torch.float64)
    torch.testing.assert_close(weight_change(layer, "both"), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("second", "match"),
    [
        ({"seed": 1}, "A0 or B0 is not the same"),
        ({"r": 2}, r"A0 is \[3, 12\] and \[2, 12\]"),
        ({"alpha": 3}, "scaling is 2 and 1"),
        ({"init": "lora"}, "A0 or B0 is not the same"),
    ],
    ids=str,
)
def test_adapters_of_different_points_are_not_added(second, match):
    model = two_tasks(**second)
    with pytest.raises(CompatibilityError, match=rf"layers.0.q_proj: adapters 'default' and 'b'.*{match}"):
        pf.add_adapters(model, {"default": 1.0, "b": 1.0}, "sum")
    with pytest.raises(RecipeError, match="has no adapter 'c'"):
        pf.add_adapters(model, {"c": 1.0}, "sum")


def test_a_model_without_linearized_layers_says_so():
    for call in (lambda m: pf.set_adapter(m, "a"), pf.task_vector, lambda m: pf.save_adapter(m, "never")):
        with pytest.raises(RecipeError, match="Transformer: has no linearized layers\nCall linearize"):
            call(base())
