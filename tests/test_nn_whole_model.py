"""scope="model": the first-order expansion of a whole network in its adapters, against torch.func.jvp over it all."""

from __future__ import annotations

import copy

import pytest
import torch
from small_models import base, linearized, stepped, tokens
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

import peta_fast as pf
from peta_fast.errors import CompatibilityError, RecipeError


def layers_of(model: pf.LinearizedModel) -> dict[str, pf.LinearizedLoRALinear]:
    return {n: m for n, m in model.model.named_modules() if isinstance(m, pf.LinearizedLoRALinear)}


def reference(plain: nn.Module, model: pf.LinearizedModel, *args, **kwargs):
    """(f(phi0), J (phi - phi0)) of the plain LoRA network W + s B A by torch.func.jvp, math attention."""
    layers, parameters = layers_of(model), dict(plain.named_parameters())
    zero = {n: torch.zeros_like(layer.delta_B) for n, layer in layers.items()}
    A0, B0 = ({n: getattr(layer, p) for n, layer in layers.items()} for p in ("A0", "B0"))
    B0 = {n: zero[n] if B is None else B for n, B in B0.items()}
    dA = {n: torch.zeros_like(la.A0) if la.delta_A is None else la.delta_A.detach() for n, la in layers.items()}
    dB = {n: layer.delta_B.detach() for n, layer in layers.items()}

    def function(A, B):
        changed = {f"{n}.weight": parameters[f"{n}.weight"] + layers[n].scaling * B[n] @ A[n] for n in layers}
        return torch.func.functional_call(plain, parameters | changed, args, kwargs)

    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(function, (A0, B0), (dA, dB))


@pytest.mark.parametrize("init", ["lora", "gaussian"])
def test_it_equals_jvp_over_the_whole_network(init):
    model = linearized(init, scope="model")
    y0, dy = reference(base(), model, tokens())
    assert dy.abs().max() > 0.05
    torch.testing.assert_close(model(tokens()), y0 + dy, rtol=1e-10, atol=1e-10)
    value, tangent = model.dual(tokens())
    torch.testing.assert_close(value, y0, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(tangent, dy, rtol=1e-10, atol=1e-10)


def test_it_is_not_the_stack_of_linearized_layers():
    layerwise, whole = linearized(), linearized(scope="model")
    whole.model.load_state_dict(layerwise.state_dict())
    assert (layerwise(tokens()) - whole(tokens())).abs().max() > 1e-3


def test_it_is_linear_in_all_steps_through_the_depth():
    model = linearized(scope="model")
    origin = copy.deepcopy(model)
    steps = {n: p for n, p in model.named_parameters() if p.requires_grad}
    u = {n: p.detach().clone() for n, p in steps.items()}
    v = {n: torch.randn(p.shape, generator=torch.Generator().manual_seed(5), dtype=p.dtype) for n, p in steps.items()}

    def at(a: float, b: float) -> torch.Tensor:
        with torch.no_grad():
            for name, step in steps.items():
                step.copy_(a * u[name] + b * v[name])
            return model(tokens())

    start = at(0, 0)
    torch.testing.assert_close(start, origin.dual(tokens())[0], rtol=1e-12, atol=1e-12)
    expected = 0.7 * (at(1, 0) - start) - 1.9 * (at(0, 1) - start)
    torch.testing.assert_close(at(0.7, -1.9) - start, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("init", ["lora", "gaussian"])
def test_gradients_are_those_of_the_linear_function(init):
    model = linearized(init, scope="model")
    out = model(tokens())
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=out.dtype)
    (out * direction).sum().backward()
    along = sum((p.grad * p).sum() for p in model.parameters() if p.requires_grad)
    torch.testing.assert_close(along, (model.dual(tokens())[1] * direction).sum(), rtol=1e-10, atol=1e-10)


def test_training_lowers_the_loss_computed_from_the_linearized_logits():
    model, labels = linearized("lora", torch.float32, scope="model").train(), torch.tensor([0, 1, 2, 0])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(tokens()), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_dropout_is_one_mask_for_value_and_tangent():
    model = linearized(scope="model", dropout=0.5).train()
    torch.manual_seed(0)
    first = model.dual(tokens())
    torch.manual_seed(0)
    second = model(tokens())
    torch.testing.assert_close(first[0] + first[1], second)
    with torch.no_grad():
        for step in (p for p in model.parameters() if p.requires_grad):
            step *= 2
    torch.manual_seed(0)
    value, tangent = model.dual(tokens())
    torch.testing.assert_close(value, first[0])
    torch.testing.assert_close(tangent, 2 * first[1])
    assert not torch.allclose(model.eval()(tokens()), second)


class Labelled(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = base()

    def forward(self, tokens, labels=None, use_cache=False, past_key_values=None):
        logits = self.body(tokens)
        loss = None if labels is None else functional.cross_entropy(logits, labels)
        return {"logits": logits, "tokens": tokens} if loss is None else {"loss": loss, "logits": logits}


def test_a_loss_inside_the_forward_is_refused():
    model = stepped(pf.linearize(Labelled(), ["q_proj"], r=2, alpha=2, init="gaussian", scope="model"))
    with pytest.raises(RecipeError, match="got labels: the forward's own loss would be linearized"):
        model(tokens(), labels=torch.tensor([0, 1, 2, 0]))
    with pytest.raises(RecipeError, match="a cache of keys and values"):
        model(tokens(), use_cache=True)
    out = model(tokens())
    assert set(out) == {"logits", "tokens"} and torch.equal(out["tokens"], tokens())
    y0, dy = reference(Labelled(), model, tokens())
    torch.testing.assert_close(out["logits"], y0["logits"] + dy["logits"], rtol=1e-10, atol=1e-10)


class Flash(nn.Module):
    """Calls an attention kernel that has no forward AD."""

    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(8, 8)

    def forward(self, x):
        q = self.q_proj(x)[:, None]
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, q, q)[0]


def test_an_operation_without_forward_ad_is_named():
    model = pf.linearize(Flash(), ["q_proj"], r=2, alpha=2, scope="model")
    with pytest.raises(CompatibilityError, match="_scaled_dot_product_flash_attention_for_cpu has no forward-mode"):
        model(torch.randn(2, 3, 8))


def test_fused_multihead_attention_steps_aside():
    """In eval mode nn.TransformerEncoderLayer takes a fused path that has no forward AD."""
    torch.manual_seed(0)
    plain = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).double().eval()
    model = stepped(pf.linearize(copy.deepcopy(plain), ["linear1"], r=2, alpha=2, init="gaussian", scope="model"))
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    y0, dy = reference(plain, model, x)
    torch.testing.assert_close(model(x), y0 + dy, rtol=1e-10, atol=1e-10)
    assert torch.backends.mha.get_fastpath_enabled()


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = base()

    def forward(self, tokens):
        return torch.utils.checkpoint.checkpoint(self.body, tokens, use_reentrant=False)


def test_checkpointing_which_repeats_parts_is_an_error():
    model = stepped(pf.linearize(Checkpointed(), ["q_proj"], r=2, alpha=2, scope="model"))
    with pytest.raises(CompatibilityError, match="was called outside of its forward"):
        model(tokens()).sum().backward()


def test_the_inner_model_alone_is_refused():
    with pytest.raises(CompatibilityError, match="belongs to a whole-model linearization"):
        linearized(scope="model").model(tokens())


def test_several_adapters_add_up_and_disabled_ones_vanish():
    model = linearized(scope="model")
    first = model.dual(tokens())[1]
    pf.linearize(model, ["q_proj", "v_proj"], r=3, alpha=6, init="lora", adapter_name="b", scope="model", seed=3)
    pf.set_adapter(model, ["default", "b"])
    torch.testing.assert_close(model.dual(tokens())[1], first)  # b has not moved yet
    with pf.disable_adapter(model):
        torch.testing.assert_close(model(tokens()), base()(tokens()))


def test_a_linearization_of_layers_is_not_mixed_with_one_of_the_model():
    with pytest.raises(RecipeError, match="scope is 'layer', the model has layers of scope 'model'"):
        pf.linearize(linearized(scope="model"), ["q_proj"], adapter_name="b")


def test_merging_and_plain_forms_are_refused(tmp_path):
    model = linearized(scope="model")
    with pytest.raises(CompatibilityError, match="part of a whole-model linearization"):
        model.model.layers[0].q_proj.merge()
    with pytest.raises(CompatibilityError, match="no equal among plain PEFT adapters"):
        pf.delinearize(model)
    with pytest.raises(CompatibilityError, match="no equal among plain PEFT adapters"):
        pf.save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_its_linearization_alone_is_saved_and_loaded(tmp_path):
    model = linearized(scope="model")
    pf.save_adapter(model, tmp_path, plain=False)
    assert [f.name for f in tmp_path.iterdir()] == ["linearization.safetensors"]
    loaded = pf.load_adapter(base(), tmp_path)
    assert isinstance(loaded, pf.LinearizedModel)
    torch.testing.assert_close(loaded(tokens()), model(tokens()))
    with pytest.raises(
        CompatibilityError, match="was trained with scope 'model', the model is linearized with scope 'layer'"
    ):
        pf.load_adapter(linearized(), tmp_path)


def test_attributes_are_those_of_the_model():
    model = linearized(scope="model")
    assert model.classifier is model.model.classifier
    with pytest.raises(AttributeError):
        model.nothing  # noqa: B018
