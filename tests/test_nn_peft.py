"""Linearized layers inside PeftModels: what PEFT trains, switches and saves, checked by loading it in plain PEFT."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from small_models import base, stepped, tokens, transformer
from torch import nn

import peta_fast as pf
from peta_fast.errors import CompatibilityError, RecipeError

peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'peta_fast[peft]'")
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402

INITS = {"B0-zero": True, "B0-not-zero": False}
both_inits = pytest.mark.parametrize("init", INITS.values(), ids=INITS)


def config(init=True, **fields) -> LoraConfig:
    settings = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": init} | fields
    return LoraConfig(**settings)


def in_peft(init=True, **fields) -> PeftModel:
    """A PeftModel of linearized layers with steps of ordinary size."""
    torch.manual_seed(0)
    return stepped(get_peft_model(base(), pf.register(config(init, **fields)))).eval()


def plain(folder, model: nn.Module | None = None) -> PeftModel:
    return PeftModel.from_pretrained(base() if model is None else model, str(folder)).eval()


def kinds(model: nn.Module) -> set[str]:
    return {type(m).__name__ for m in model.modules() if isinstance(m, peft.tuners.lora.layer.LoraLayer)}


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


@both_inits
def test_get_peft_model_builds_our_layers_and_trains_their_steps_alone(init):
    model = get_peft_model(base(), pf.register(config(init)))
    assert kinds(model) == {"LinearizedLoraLayer"}
    trained = {n.rpartition("proj.")[2] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == ({"lora_B.default.weight"} if init else {"lora_A.default.step", "lora_B.default.step"})


def test_registered_by_hand_it_is_the_same(tmp_path):
    from peta_fast.nn.peft_layer import LinearizedLoraLayer

    by_hand = config(False)
    by_hand._register_custom_module({nn.Linear: LinearizedLoraLayer})
    model = stepped(get_peft_model(base(), by_hand))
    model.save_pretrained(tmp_path)
    assert largest_difference(plain(tmp_path)(tokens()), model(tokens())) < 1e-12


@both_inits
def test_the_function_is_linear_in_the_steps_of_a_layer(init):
    layer = in_peft(init).base_model.model.layers[0].q_proj
    x = torch.randn(4, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    steps = [p for p in layer.parameters() if p.requires_grad]

    def at(scale: float) -> torch.Tensor:
        with torch.no_grad():
            saved = [s.clone() for s in steps]
            for step in steps:
                step *= scale
            y = layer(x)
            for step, before in zip(steps, saved, strict=True):
                step.copy_(before)
            return y

    torch.testing.assert_close(at(3.0) - at(0.0), 3 * (at(1.0) - at(0.0)), rtol=1e-10, atol=1e-12)


PATTERNS = {"rank_pattern": {"v_proj": 5}, "alpha_pattern": {"0.q_proj": 10}}


@both_inits
@pytest.mark.parametrize("fields", [{}, {"use_rslora": True}, PATTERNS], ids=["plain", "rslora", "patterns"])
def test_save_pretrained_writes_what_plain_peft_loads_exactly(init, fields, tmp_path):
    model = in_peft(init, **fields)
    model.save_pretrained(tmp_path)
    loaded = plain(tmp_path)
    assert kinds(loaded) == {"Linear"}
    assert largest_difference(loaded(tokens()), transformer()(tokens())) > 1e-2
    assert largest_difference(loaded(tokens()), model(tokens())) < 1e-12
    rank = json.loads((tmp_path / "adapter_config.json").read_text())["r"]
    assert rank == 3 * (1 if init else 2) or fields == PATTERNS


@both_inits
def test_beside_it_lies_the_linearization_that_we_load(init, tmp_path):
    model = in_peft(init)
    model.save_pretrained(tmp_path)
    loaded = pf.load_adapter(base(), tmp_path)
    assert largest_difference(loaded(tokens()), model(tokens())) < 1e-12
    steps, expected = pf.task_vector(loaded), pf.task_vector(model)
    assert set(steps) == set(expected)
    for name, step in steps.items():
        torch.testing.assert_close(step, expected[name], rtol=0, atol=0)


def test_left_alone_peft_would_write_a_file_that_plain_peft_refuses(tmp_path):
    """The tensors before our config completes them: an error on loading, never the bare base model."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    raw = get_peft_model_state_dict(in_peft(False))
    with pytest.raises(RuntimeError, match="size mismatch"):
        set_peft_model_state_dict(get_peft_model(base(), config()), raw)


def test_a_pickle_is_refused(tmp_path):
    with pytest.raises(CompatibilityError, match="Call save_pretrained with safe_serialization=True"):
        in_peft().save_pretrained(tmp_path, safe_serialization=False)


@both_inits
def test_a_checkpoint_of_peft_loads_back_into_linearized_layers(init, tmp_path):
    """As Trainer does on resuming: load_adapter over the adapter that is there."""
    model = in_peft(init)
    model.save_pretrained(tmp_path)
    fresh = get_peft_model(base(), pf.register(config(init)))
    fresh.load_adapter(str(tmp_path), "default", is_trainable=True)
    assert largest_difference(fresh(tokens()), model(tokens())) < 1e-12
    for name, step in pf.task_vector(fresh).items():
        torch.testing.assert_close(step, pf.task_vector(model)[name], rtol=1e-12, atol=1e-12)


def test_modules_to_save_travel_with_it(tmp_path):
    model = in_peft(False, modules_to_save=["classifier"])
    model.save_pretrained(tmp_path)
    assert "base_model.model.classifier.weight" in load_file(tmp_path / "adapter_model.safetensors")
    assert largest_difference(plain(tmp_path)(tokens()), model(tokens())) < 1e-12


def two_adapters(init=False, **second) -> PeftModel:
    model = in_peft(init)
    other = copy.deepcopy(model.peft_config["default"])
    for field, value in second.items():
        setattr(other, field, value)
    model.add_adapter("b", other)
    layers = [m for m in model.modules() if type(m).__name__ == "LinearizedLoraLayer"]
    if not second:
        for layer in layers:  # one point for both tasks
            layer.set_factors("b", layer.factors("default"))
    model.set_adapter("b")
    stepped(model, seed=4)
    model.set_adapter("default")
    return model


def test_add_weighted_adapter_is_refused_with_the_call_to_use(tmp_path):
    model = two_adapters()
    with pytest.raises(CompatibilityError, match=r"add_weighted_adapter.*\nUse peta_fast.add_adapters\(model"):
        model.add_weighted_adapter(["default", "b"], [1.0, 1.0], "sum", combination_type="cat")
    assert list(model.peft_config) == ["default", "b"]
    before = model(tokens())
    model.save_pretrained(tmp_path)
    assert largest_difference(plain(tmp_path)(tokens()), before) < 1e-12


@both_inits
def test_that_call_adds_the_steps(init):
    model = two_adapters(init)
    pf.add_adapters(model, {"default": 0.5, "b": -2.0}, "sum")
    a, b, total = (pf.task_vector(model, name) for name in ("default", "b", "sum"))
    for name, step in total.items():
        torch.testing.assert_close(step, 0.5 * a[name] - 2.0 * b[name])
    model.set_adapter("sum")
    layer = model.base_model.model.layers[0].q_proj
    assert torch.equal(layer.factors("sum").A0, layer.factors("default").A0)


def test_that_call_refuses_adapters_of_different_points():
    with pytest.raises(CompatibilityError, match="layers.0.q_proj: adapters 'default' and 'b'"):
        pf.add_adapters(two_adapters(r=2), {"default": 1.0, "b": 1.0}, "sum")
    with pytest.raises(RecipeError, match="already has an adapter 'b'"):
        pf.add_adapters(two_adapters(), {"default": 1.0}, "b")


def test_adapters_switch_merge_and_unload_as_in_peft(tmp_path):
    model = two_adapters()
    outputs = {}
    for name in ("default", "b"):
        model.set_adapter(name)
        outputs[name] = model(tokens())
    assert largest_difference(outputs["default"], outputs["b"]) > 1e-3
    with model.disable_adapter():
        assert torch.equal(model(tokens()), transformer()(tokens()))
    model.merge_adapter()
    torch.testing.assert_close(model(tokens()), outputs["b"], rtol=1e-10, atol=1e-10)
    model.unmerge_adapter()
    torch.testing.assert_close(model(tokens()), outputs["b"], rtol=1e-10, atol=1e-10)
    merged = model.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(merged(tokens()), outputs["b"], rtol=1e-10, atol=1e-10)


def test_an_adapter_read_from_a_file_is_not_mixed_in(tmp_path):
    in_peft().save_pretrained(tmp_path)
    model = in_peft()
    with pytest.raises(CompatibilityError, match="its LoraConfig knows nothing of linearized layers"):
        model.load_adapter(str(tmp_path), "b")


@pytest.mark.parametrize(
    ("target", "match"), [("embed", "embed: is a Embedding"), ("layers.0", "layers.0: is a Attention")]
)
def test_layers_that_are_not_linear_are_refused(target, match):
    with pytest.raises(CompatibilityError, match=match):
        get_peft_model(base(), pf.register(config(target_modules=[target])))


def test_a_different_adapter_for_every_row_is_refused():
    model = in_peft()
    with pytest.raises(CompatibilityError, match="a different adapter for every row"):
        model.base_model.model.layers[0].q_proj(torch.randn(2, 12).double(), adapter_names=["default", "__base__"])


# linearizing a PeftModel around what it has learned


def plain_peft_model(init=False, **fields) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(base(), config(init, **fields)).eval()


@both_inits
def test_linearized_around_its_adapters_the_function_is_the_same_at_first(init):
    model = plain_peft_model(init)
    expected = model(tokens())
    layer = pf.linearize(model).base_model.model.layers[0].q_proj
    assert kinds(model) == {"LinearizedLoraLayer"} and (layer.factors("default").B0 is None) == init
    assert largest_difference(model(tokens()), expected) < 1e-12


def test_trained_on_from_there_it_saves_the_exact_plain_form(tmp_path):
    model = stepped(pf.linearize(plain_peft_model()))
    model.save_pretrained(tmp_path)
    assert largest_difference(plain(tmp_path)(tokens()), model(tokens())) < 1e-12
    pf.save_adapter(model, tmp_path / "again")
    assert largest_difference(plain(tmp_path / "again")(tokens()), model(tokens())) < 1e-12


def test_the_tangent_is_that_of_the_plain_layer():
    """One layer around a trained adapter equals torch.func.jvp of PEFT's own layer."""
    model = plain_peft_model()
    theirs = copy.deepcopy(model.base_model.model.layers[0].q_proj)
    ours = stepped(pf.linearize(model)).base_model.model.layers[0].q_proj
    x = torch.randn(4, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    point = {n: p.detach() for n, p in theirs.named_parameters() if "lora_" in n}
    step = {n: ours.get_submodule(n.removesuffix(".weight")).step.detach() for n in point}
    y0, dy = torch.func.jvp(lambda p: torch.func.functional_call(theirs, p, (x,)), (point,), (step,))
    torch.testing.assert_close(ours(x), y0 + dy, rtol=1e-12, atol=1e-12)


@both_inits
def test_from_peft_makes_a_standalone_layer_with_all_adapters(init):
    model = plain_peft_model(init)
    model.add_adapter("b", config(False, lora_dropout=0.1))
    model.eval()
    layer = model.base_model.model.layers[0].q_proj
    made = pf.LinearizedLoRALinear.from_peft(layer)
    x = torch.randn(4, 12, dtype=torch.float64)
    assert made.adapter_names == ("default", "b") and made.b0_is_zero == init
    for name in ("default", "b"):
        model.set_adapter(name)
        made.set_adapter(name)
        assert largest_difference(made(x), layer(x)) < 1e-12
    assert made.adapter("b").dropout == 0.1 and made.weight is layer.base_layer.weight


def test_the_whole_model_can_be_linearized_around_its_adapters():
    model = plain_peft_model()
    expected = model(tokens())
    whole = pf.linearize(model, scope="model")
    assert isinstance(whole, pf.LinearizedModel) and not isinstance(whole.model, PeftModel)
    assert largest_difference(whole(tokens()), expected) < 1e-12
    assert stepped(whole).dual(tokens())[1].abs().max() > 1e-3


@both_inits
def test_delinearized_it_is_plain_peft_again(init, tmp_path):
    model = in_peft(init)
    expected = model(tokens())
    assert kinds(pf.delinearize(model)) == {"Linear"}
    assert largest_difference(model(tokens()), expected) < 1e-12
    model.save_pretrained(tmp_path)
    assert largest_difference(plain(tmp_path)(tokens()), expected) < 1e-12


def test_dora_is_refused_by_name_and_the_model_is_left_alone():
    model = plain_peft_model(use_dora=True)
    with pytest.raises(CompatibilityError, match="adapter 'default': expected plain LoRA, got use_dora"):
        pf.linearize(model)
    assert kinds(model) == {"Linear"}
    with pytest.raises(CompatibilityError, match="is no plain LoRA: DoraLinearVariant"):
        pf.LinearizedLoRALinear.from_peft(model.base_model.model.layers[0].q_proj)


def test_a_merged_adapter_and_a_layer_of_another_kind_are_refused():
    model = plain_peft_model()
    model.merge_adapter()
    with pytest.raises(CompatibilityError, match="layers.0.q_proj: has merged adapters"):
        pf.linearize(model)
    with pytest.raises(CompatibilityError, match="expected PEFT's LoRA Linear"):
        pf.LinearizedLoRALinear.from_peft(nn.Linear(2, 2))
    with pytest.raises(RecipeError, match="got a PeftModel and target_modules"):
        pf.linearize(plain_peft_model(), ["q_proj"])
