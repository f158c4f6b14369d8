"""LinearizedLoRALinear: its function, its parameters, its adapters by name, and what it refuses."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import peta_fast as pf
from peta_fast.errors import CompatibilityError, RecipeError

SIZES = {"in_features": 7, "out_features": 5, "r": 3, "alpha": 6}


def layer(init: str = "gaussian", **options) -> pf.LinearizedLoRALinear:
    """fp64, with steps of ordinary size."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of the base weight; `seed` is the adapter's
        made = pf.LinearizedLoRALinear(**{**SIZES, "init": init, "seed": 0, "dtype": torch.float64, **options})
    return with_steps(made)


def with_steps(made: pf.LinearizedLoRALinear) -> pf.LinearizedLoRALinear:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for step in made.steps():
            step.normal_(generator=generator)
    return made


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def change(made) -> torch.Tensor:
    """dW [out, in] by the definition: the first-order terms of B A around (A0, B0), and the point itself."""
    zero_A, zero_B = torch.zeros(3, 7, dtype=torch.float64), torch.zeros(5, 3, dtype=torch.float64)
    dA, B0 = (zero_A if t is None else t for t in (made.delta_A, made.B0 if made.B0 is not None else zero_B))
    return made.scaling * (B0 @ made.A0 + made.delta_B @ made.A0 + B0 @ dA)


def worked(B0, task) -> pf.LinearizedLoRALinear:
    """W = [[1, 2], [0, 1]], s = 2, A0 = [.5, -.25], at the task's (A, B)."""
    made = pf.LinearizedLoRALinear(
        2, 2, r=1, alpha=2, bias=False, dtype=torch.float64, init="gaussian" if B0 else "lora"
    )
    A, B = (torch.tensor(t, dtype=torch.float64) for t in task)
    with torch.no_grad():
        made.weight.copy_(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
        made.A0.copy_(torch.tensor([[0.5, -0.25]]))
        if B0:
            made.B0.copy_(torch.tensor(B0, dtype=torch.float64).reshape(2, 1))
            made.delta_A.copy_(A - made.A0)
            made.delta_B.copy_(B.reshape(2, 1) - made.B0)
        else:
            made.delta_B.copy_(B.reshape(2, 1))
    return made


TASK_1 = ([[0.6, -0.05]], [0.4, -0.2])


@pytest.mark.parametrize(("B0", "expected"), [(None, [-0.40, -1.30]), ([0.1, 0.3], [-0.42, -1.36])])
def test_the_numbers_worked_by_hand(B0, expected):
    y = worked(B0, TASK_1)(torch.tensor([1.0, -1.0], dtype=torch.float64))
    torch.testing.assert_close(y, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("init", ["lora", "gaussian"])
@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (0,)], ids=str)
def test_the_function_is_the_weight_plus_the_first_order_change(init, shape):
    made, x = layer(init), inputs(*shape)
    expected = nn.functional.linear(x, made.weight + change(made), made.bias)
    torch.testing.assert_close(made(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("init", ["lora", "gaussian"])
def test_gradients_are_those_of_the_definition(init):
    made, x = layer(init), inputs(4).requires_grad_()
    wanted = [*made.steps(), x]
    ours = torch.autograd.grad(made(x).sin().sum(), wanted)
    written_out = nn.functional.linear(x, made.weight + change(made), made.bias)
    for gradient, expected in zip(ours, torch.autograd.grad(written_out.sin().sum(), wanted), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


def test_a_new_layer_starts_at_the_point_with_steps_of_zero():
    made = pf.LinearizedLoRALinear(**SIZES, init="gaussian")
    assert {n: tuple(p.shape) for n, p in made.named_parameters() if p.requires_grad} == {
        "delta_A": (3, 7), "delta_B": (5, 3),
    }  # fmt: skip
    assert {n: tuple(b.shape) for n, b in made.named_buffers()} == {"A0": (3, 7), "B0": (5, 3)}
    assert not made.delta_A.any() and not made.delta_B.any() and made.A0.any() and made.B0.any()
    assert set(made.state_dict()) == {"weight", "bias", "A0", "B0", "delta_A", "delta_B"}


def test_where_B0_is_zero_there_is_no_delta_A():
    made = pf.LinearizedLoRALinear(**SIZES)
    assert set(made.state_dict()) == {"weight", "bias", "A0", "delta_B"} and made.b0_is_zero
    assert made.A0.abs().max() <= 7**-0.5
    x = torch.randn(2, 7)
    assert torch.equal(made(x), nn.functional.linear(x, made.weight, made.bias))


def test_where_B0_is_zero_the_general_form_gives_the_same():
    fast, general = layer("lora"), layer("gaussian")
    with torch.no_grad():
        general.B0.zero_()
    general.load_state_dict(fast.state_dict(), strict=False)
    torch.testing.assert_close(general(inputs(4)), fast(inputs(4)), rtol=1e-12, atol=1e-12)
    general(inputs(4)).sin().sum().backward()
    assert not general.delta_A.grad.any()


@pytest.mark.parametrize("init", ["lora", "gaussian"])
def test_one_seed_gives_one_point(init):
    first, again, other = (pf.LinearizedLoRALinear(**SIZES, init=init, seed=s) for s in (3, 3, 4))
    assert torch.equal(first.A0, again.A0) and not torch.equal(first.A0, other.A0)
    if init == "gaussian":
        assert torch.equal(first.B0, again.B0)


def test_scaling_is_alpha_over_r_or_over_its_root():
    assert layer().scaling == 2.0
    assert layer(rslora=True).scaling == pytest.approx(6 / 3**0.5)


def test_from_linear_shares_weight_and_bias_under_their_names():
    linear = nn.Linear(7, 5)
    made = pf.LinearizedLoRALinear.from_linear(linear, r=3, alpha=6)
    assert made.weight is linear.weight and made.bias is linear.bias and not made.weight.requires_grad
    x = torch.randn(2, 7)
    assert torch.equal(made(x), linear(x))


def test_weight_decay_pulls_towards_the_point_of_linearization():
    made = layer()
    optimizer = torch.optim.AdamW(made.parameters(), lr=0.1, weight_decay=0.5)
    before = {n: p.detach().clone() for n, p in made.named_parameters()}
    (made(inputs(2)) * 0).sum().backward()
    optimizer.step()
    for name in ("delta_A", "delta_B"):
        torch.testing.assert_close(getattr(made, name), 0.95 * before[name])
    assert torch.equal(made.weight, before["weight"])


def conv1d(n_out: int, n_in: int):
    transformers = pytest.importorskip("transformers")
    return transformers.pytorch_utils.Conv1D(n_out, n_in).double()


@pytest.mark.parametrize("init", ["lora", "gaussian"])
def test_a_conv1d_keeps_its_transposed_weight(init):
    base = conv1d(5, 7)
    made = with_steps(pf.LinearizedLoRALinear.from_linear(base, r=3, alpha=6, init=init, seed=0))
    assert made.weight is base.weight and tuple(made.weight.shape) == (7, 5)
    expected = nn.functional.linear(inputs(4), base.weight.t() + change(made), base.bias)
    torch.testing.assert_close(made(inputs(4)), expected, rtol=1e-12, atol=1e-12)
    made.merge()
    torch.testing.assert_close(made(inputs(4)), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("init", ["lora", "gaussian"])
def test_merging_gives_the_same_function_and_unmerging_the_same_weight(init):
    made, x = layer(init), inputs(4)
    before, weight = made(x), made.weight
    bits = weight.clone()
    made.merge()
    assert made.merged and made.weight is not weight
    torch.testing.assert_close(made(x), before, rtol=1e-12, atol=1e-12)
    made.unmerge()
    assert made.weight is weight and torch.equal(made.weight, bits) and torch.equal(made(x), before)


def test_merging_twice_and_unmerging_what_is_not_merged_are_errors():
    made = layer()
    with pytest.raises(RecipeError, match="not merged"):
        made.unmerge()
    made.merge()
    with pytest.raises(RecipeError, match="merged already"):
        made.merge()


def test_adapters_by_name_switch_and_add_up():
    made, x = layer("gaussian"), inputs(4)
    first = made(x)
    made.add_factors("other", with_steps(layer("lora", seed=5)).factors())
    assert made.adapter_names == ("default", "other") and torch.equal(made(x), first)
    plain = nn.functional.linear(x, made.weight, made.bias)
    made.set_adapter("other")
    second = made(x)
    assert [n for n, p in made.named_parameters() if p.requires_grad] == ["adapters.other.delta_B"]
    made.set_adapter(["default", "other"])
    torch.testing.assert_close(made(x) - plain, (first - plain) + (second - plain), rtol=1e-12, atol=1e-12)
    with made.disable_adapter():
        assert torch.equal(made(x), plain)
    made.set_adapter("default")
    assert torch.equal(made(x), first)


def test_unknown_and_doubled_names_are_errors():
    made = layer()
    with pytest.raises(RecipeError, match="no adapter 'x', only 'default'"):
        made.set_adapter("x")
    with pytest.raises(RecipeError, match="already has an adapter 'default'"):
        made.add_factors("default", made.factors())
    with pytest.raises(RecipeError, match="without dots"):
        made.add_factors("a.b", made.factors())


def test_the_task_vector_is_a_copy_of_the_steps():
    made = layer()
    vector = made.task_vector()
    assert torch.equal(vector["delta_A"], made.delta_A) and torch.equal(vector["delta_B"], made.delta_B)
    vector["delta_B"].zero_()
    assert made.delta_B.any()
    assert set(layer("lora").task_vector()) == {"delta_B"}


def test_dropout_touches_the_adapter_alone_and_only_in_training():
    made, x = layer("gaussian", dropout=0.5), inputs(400)
    torch.manual_seed(0)
    dropped = made.train()(x)
    assert torch.equal(made.eval()(x), layer("gaussian")(x))
    torch.manual_seed(0)
    assert torch.equal(made.train()(x), dropped)
    plain = nn.functional.linear(x, made.weight, made.bias)
    of_adapter = made.eval()(x) - plain
    torch.testing.assert_close((dropped - plain).mean(0), of_adapter.mean(0), rtol=0, atol=1.0)
    assert not torch.allclose(dropped, made(x))


def test_it_survives_copies_pickles_and_state_dicts():
    made, x = layer("gaussian"), inputs(4)
    made.add_factors("other", layer("lora").factors())
    expected = made(x)
    assert torch.equal(copy.deepcopy(made)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(made))(x), expected)
    fresh = pf.LinearizedLoRALinear(**SIZES, init="gaussian", dtype=torch.float64)
    fresh.add_factors("other", layer("lora").factors())
    assert fresh.load_state_dict(made.state_dict()) == nn.modules.module._IncompatibleKeys([], [])
    assert torch.equal(fresh(x), expected)


def test_a_layer_of_half_precision_may_keep_its_steps_in_fp32():
    linear = nn.Linear(7, 5, dtype=torch.bfloat16)
    made = pf.LinearizedLoRALinear.from_linear(linear, r=3, alpha=6, adapter_dtype=torch.float32)
    assert made.delta_B.dtype == made.A0.dtype == torch.float32
    y = made(torch.randn(2, 7, dtype=torch.bfloat16))
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and made.delta_B.grad.dtype == torch.float32


def test_a_quantized_weight_is_dequantized_at_every_call():
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    linear = bitsandbytes.nn.Linear4bit(64, 32, compute_dtype=torch.float32)
    try:
        linear = linear.to("cuda" if torch.cuda.is_available() else "cpu")
        expected = bitsandbytes.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state)
    except Exception as error:
        pytest.skip(f"bitsandbytes cannot quantize here: {error}")
    made = pf.LinearizedLoRALinear.from_linear(linear, r=4, alpha=8, init="gaussian", seed=0)
    with_steps(made)
    x = torch.randn(3, 64, device=expected.device)
    weight = expected.float() + made.scaling * ((made.B0 + made.delta_B) @ made.A0 + made.B0 @ made.delta_A)
    torch.testing.assert_close(made(x), nn.functional.linear(x, weight, linear.bias), rtol=1e-4, atol=1e-4)
    with pytest.raises(CompatibilityError, match="quantized"):
        made.merge()


# what is refused


@pytest.mark.parametrize("r", [0, -1, 8, 2.0], ids=str)
def test_a_rank_that_does_not_fit_is_refused(r):
    with pytest.raises(RecipeError, match=r"r is .*, expected an integer from 1 to 7: the weight is \[5, 7\]"):
        pf.LinearizedLoRALinear(7, 5, r=r, alpha=1)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"dropout": -0.1}, "dropout is -0.1"),
        ({"init": "pissa"}, "init is 'pissa', expected one of 'lora', 'gaussian'"),
        ({"alpha": float("nan")}, "alpha is nan"),
    ],
)
def test_settings_that_mean_nothing_are_refused(options, match):
    with pytest.raises(RecipeError, match=match):
        pf.LinearizedLoRALinear(**(SIZES | options))


def test_an_input_of_another_size_names_the_layer_and_both_shapes():
    model = pf.linearize(nn.Sequential(nn.Linear(7, 5)), ["0"], r=2, alpha=2)
    with pytest.raises(CompatibilityError, match=r"0: x is \[2, 6\], expected \[\*, 7\]"):
        model(torch.randn(2, 6))
    with pytest.raises(CompatibilityError, match=r"x is \[\], expected"):
        model(torch.tensor(1.0))


def test_an_input_of_another_dtype_or_device_is_refused():
    made = pf.LinearizedLoRALinear(**SIZES)
    with pytest.raises(CompatibilityError, match="x is torch.float64, the weight torch.float32"):
        made(inputs(2))
    with pytest.raises(CompatibilityError, match="x is on meta, the weight on cpu"):
        made(torch.randn(2, 7, device="meta"))


def with_hook() -> nn.Module:
    linear = nn.Linear(4, 4)
    linear.register_forward_hook(lambda *_: None)
    return linear


class Odd(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


@pytest.mark.parametrize(
    ("module", "match"),
    [
        (nn.Embedding(4, 4), "is a Embedding, expected a Linear: an embedding's adapter is looked up"),
        (nn.Conv2d(4, 4, 1), "is a Conv2d, expected nn.Linear"),
        (nn.MultiheadAttention(4, 2).out_proj, "the output projection of nn.MultiheadAttention"),
        (Odd(4, 4), "is a Odd with a forward of its own"),
        (with_hook(), "has forward hooks"),
    ],
    ids=["embedding", "conv2d", "attention", "subclass", "hook"],
)
def test_layers_that_cannot_be_linearized_are_refused_with_the_reason(module, match):
    with pytest.raises(CompatibilityError, match=match):
        pf.LinearizedLoRALinear.from_linear(module, r=2, alpha=2)


def test_an_adapter_of_other_sizes_is_refused():
    with pytest.raises(CompatibilityError, match=r"the adapter's A0 is \[3, 7\], expected \[3, 6\]"):
        pf.LinearizedLoRALinear.from_factors(nn.Linear(6, 5), layer().factors())
