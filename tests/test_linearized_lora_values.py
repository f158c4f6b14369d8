"""Values and gradients of linearized LoRA: by hand, against torch.func.jvp in fp64, and in low precision."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from linearized_lora_cases import (
    SCALING,
    Case,
    assert_as_accurate,
    assert_close,
    gradients,
    jvp_gradients,
    make_case,
)
from torch.utils._python_dispatch import TorchDispatchMode

from peta_fast.ops.linearized_lora import linearized_lora, linearized_lora_dual
from peta_fast.ops.linearized_lora.reference import PlainLoRA, backward_reference, dual_reference, forward_reference

LINEARIZATIONS = pytest.mark.parametrize("b0_is_zero", [False, True], ids=["general", "b0_is_zero"])
SHAPES = [(5,), (4, 5), (2, 3, 5), (2, 2, 3, 5), (1, 5), (0, 5), (2, 0, 5), (33, 130)]
RANKS = [1, 4, 8, 16, 64]


def fp64(*rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


# ---------------------------------------------------------------- by hand

WEIGHT, X = fp64([1, 2], [0, 1]), fp64(1, -1)
A0, A = fp64([0.5, -0.25]), fp64([0.6, -0.05])
B = fp64([0.4], [-0.2])


def test_a_lora_layer_that_is_not_linearized():
    assert_close(PlainLoRA(WEIGHT, None, A, B, 2.0)(X).detach(), fp64(-0.48, -1.26))


def test_expanded_around_B0_0_A_stays_where_it_started():
    """x A0ᵀ = 0.75; y = [-1, -1] + 2 · 0.75 · [0.4, -0.2]"""
    assert_close(linearized_lora(X, WEIGHT, None, A0, None, None, B, 2.0), fp64(-0.40, -1.30))


def test_expanded_around_another_B0_A_moves_too():
    """x dAᵀ = -0.1, so 2 · (-0.1) · [0.1, 0.3] is added"""
    B0 = fp64([0.1], [0.3])
    assert_close(linearized_lora(X, WEIGHT, None, A0, A - A0, B0, B - B0, 2.0), fp64(-0.42, -1.36))


def two_layers() -> list[tuple]:
    """weight, A0 and dB of two scalar layers: w 2, 3; a .5, .25; b .4, -.2."""
    return [(fp64([2]), fp64([0.5]), fp64([0.4])), (fp64([3]), fp64([0.25]), fp64([-0.2]))]


def test_stacked_layers_keep_the_product_of_their_updates():
    y = fp64(1)
    for weight, A0, dB in two_layers():
        y = linearized_lora(y, weight, None, A0, None, None, dB, 1.0)
    assert_close(y, fp64(6.49))


def test_stacked_duals_are_the_expansion_of_the_whole_and_leave_it_out():
    y, dy = fp64(1), None
    for weight, A0, dB in two_layers():
        y, dy = linearized_lora_dual(y, dy, weight, None, A0, None, None, dB, 1.0)
    assert_close(y, fp64(6.0))
    assert_close(y + dy, fp64(6.50))


# ---------------------------------------------------------------- against the jvp of a plain LoRA layer


@LINEARIZATIONS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradients_are_those_of_the_jvp(shape, b0_is_zero):
    case = make_case(*shape, b0_is_zero=b0_is_zero).training("x", "dA", "dB")
    y = case.forward()
    assert_close(y, case.jvp_reference()(case.x))
    g = torch.randn_like(y)
    expected = jvp_gradients(case, g)
    for name, found in gradients(case, y, g).items():
        assert_close(found, expected[name])


@LINEARIZATIONS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("moving_input", [True, False], ids=["dx", "no_dx"])
def test_dual_and_its_gradients_are_those_of_the_jvp(shape, b0_is_zero, moving_input):
    case = make_case(*shape, b0_is_zero=b0_is_zero).training("x", "dA", "dB")
    dx = torch.randn_like(case.x) if moving_input else None
    found = case.dual(dx)
    for ours, theirs in zip(found, case.jvp_reference().dual(case.x, dx), strict=True):
        assert_close(ours, theirs)
    g, gdy = torch.randn_like(found[0]), torch.randn_like(found[1])
    leaves = case.leaves()
    ours = torch.autograd.grad(found, tuple(leaves.values()), (g, gdy))
    expected = jvp_gradients(case, g, gdy, dx)
    for name, gradient in zip(leaves, ours, strict=True):
        assert_close(gradient, expected[name])


@LINEARIZATIONS
@pytest.mark.parametrize("shape", [(4, 5), (2, 3, 5), (5,), (0, 5), (33, 130)], ids=str)
@pytest.mark.parametrize("with_value", [True, False], ids=["both", "tangent_alone"])
def test_gradients_of_the_dual_along_the_tangent_of_its_input(with_value, shape, b0_is_zero):
    """tangent_alone: nothing flows back through y0, as in a whole model around a fixed point."""
    case = make_case(*shape, b0_is_zero=b0_is_zero).training("x", "dA", "dB")
    dx = torch.randn_like(case.x).requires_grad_()
    reference = case.jvp_reference()
    step = [p for p in reference.layer.parameters() if p.requires_grad]
    step = step[1:] if b0_is_zero else step  # there A has no effect, and we have none
    x, moving = case.x.detach().clone().requires_grad_(), dx.detach().clone().requires_grad_()
    ours, theirs = case.dual(dx), reference.dual(x, moving)
    g = [torch.randn_like(y) for y in ours]
    chosen = slice(0, 2) if with_value else slice(1, 2)
    found = torch.autograd.grad(ours[chosen], (dx, *case.leaves().values()), g[chosen])
    expected = torch.autograd.grad(theirs[chosen], (moving, x, *step), g[chosen])
    for gradient, exact in zip(found, expected, strict=True):
        assert_close(gradient, exact)


@LINEARIZATIONS
@pytest.mark.parametrize("name", ["x", "dx", "weight", "bias", "dA", "dB"])
@pytest.mark.parametrize("with_value", [True, False], ids=["both", "tangent_alone"])
def test_each_gradient_of_the_dual_alone(with_value, name, b0_is_zero):
    if name == "dA" and b0_is_zero:
        pytest.skip("there is no dA")
    case = make_case(4, 5, b0_is_zero=b0_is_zero).training(name)
    dx = torch.randn_like(case.x).requires_grad_(name == "dx")
    leaf = dx if name == "dx" else getattr(case, name)
    plain = dual_reference(case.x, dx, *case.arguments()[1:], SCALING)[:2]
    chosen = [i for i in ((0, 1) if with_value else (1,)) if plain[i].requires_grad]
    g = [torch.randn_like(plain[i]) for i in chosen]
    if not chosen:
        pytest.skip("it has no effect on the tangent")
    found, expected = (torch.autograd.grad([ys[i] for i in chosen], leaf, g)[0] for ys in (case.dual(dx), plain))
    assert_close(found, expected)


def test_the_dual_backward_reads_the_weight_once_for_each_gradient_that_passes_it():
    """As products with the base weight: x and dx forward; backward none for x where the value has no gradient."""
    counted = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            if any(isinstance(a, torch.Tensor) and 0 not in a.shape and set(a.shape) == {40, 50} for a in arguments):
                counted.append(function.name())
            return function(*arguments, **(options or {}))

    case = make_case(6, 40, out=50).training("x", "dA", "dB")
    dx = torch.randn_like(case.x).requires_grad_()
    with Count():
        y0, dy = case.dual(dx)
        forward = [n for n in counted if "mm" in n]
        counted.clear()
        dy.sum().backward()
    assert len(forward) == 2 and len([n for n in counted if "mm" in n]) == 1


@pytest.mark.parametrize("r", RANKS)
def test_any_rank(r):
    case = make_case(9, 70, out=66, r=r).training("x", "dA", "dB")
    y = case.forward()
    g = torch.randn_like(y)
    assert_close(y, case.jvp_reference()(case.x))
    expected = jvp_gradients(case, g)
    for name, found in gradients(case, y, g).items():
        assert_close(found, expected[name])


def test_at_B0_0_A_has_a_gradient_of_exactly_zero_and_its_step_no_effect():
    case = make_case(6, 5)
    case = replace(case, B0=torch.zeros_like(case.B0)).training()
    y = case.forward()
    found = gradients(case, y, torch.ones_like(y))
    assert torch.equal(found["dA"], torch.zeros_like(case.dA))
    assert_close(y, case.zero_B0().forward())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_path_for_B0_0_is_the_general_one(shape):
    general = make_case(*shape)
    general = replace(general, B0=torch.zeros_like(general.B0)).training()
    fast = general.zero_B0().training()
    y, y_fast = general.forward(), fast.forward()
    assert_close(y_fast, y)
    g = torch.randn_like(y)
    expected = gradients(general, y, g)
    for name, found in gradients(fast, y_fast, g).items():
        assert_close(found, expected[name])


@LINEARIZATIONS
def test_gradients_of_weight_and_bias(b0_is_zero):
    case = make_case(2, 6, 5, b0_is_zero=b0_is_zero).training()
    y = case.forward()
    g = torch.randn_like(y)
    found = gradients(case, y, g)
    assert_close(found["weight"], torch.einsum("abo,abi->oi", g, case.x))
    assert_close(found["bias"], g.sum((0, 1)))


@LINEARIZATIONS
def test_linear_in_the_step(b0_is_zero):
    """y(p + q) - y(0) = [y(p) - y(0)] + [y(q) - y(0)]"""
    p, q = (make_case(4, 5, b0_is_zero=b0_is_zero, seed=seed) for seed in (0, 1))

    def moved(dA, dB):
        return replace(p, dA=None if b0_is_zero else dA, dB=dB).forward()

    start = moved(0 * p.A0, 0 * p.dB)
    both = moved(None if b0_is_zero else p.dA + q.dA, p.dB + q.dB)
    assert_close(both - start, moved(p.dA, p.dB) - start + moved(q.dA, q.dB) - start)


def strided(case: Case) -> Case:
    """Every tensor a transpose of contiguous memory, x with a gap in each row besides."""
    wide = torch.randn(*case.x.shape[:-1], 2 * case.x.shape[-1], dtype=case.x.dtype)
    wide[..., ::2] = case.x
    turned = {n: t.t().contiguous().t() for n, t in case.tensors().items() if t.dim() == 2 and n != "x"}
    return replace(case, x=wide[..., ::2], **turned)


@LINEARIZATIONS
def test_strides_do_not_matter(b0_is_zero):
    case = make_case(2, 6, 5, b0_is_zero=b0_is_zero)
    views = strided(case)
    assert not views.x.is_contiguous() and not views.weight.is_contiguous() and not views.dB.is_contiguous()
    assert_close(views.forward(), case.forward())
    dx = torch.randn(6, 2, 5, dtype=torch.float64).transpose(0, 1)
    for ours, expected in zip(views.dual(dx), case.dual(dx.contiguous()), strict=True):
        assert_close(ours, expected)


@LINEARIZATIONS
def test_a_gradient_that_is_expanded_from_one_number(b0_is_zero):
    case = make_case(4, 5, b0_is_zero=b0_is_zero).training()
    y = case.forward()
    expected = gradients(case, case.forward(), torch.ones_like(y))
    found = dict(zip(expected, torch.autograd.grad(y.sum(), tuple(case.leaves().values())), strict=True))
    for name in expected:
        assert_close(found[name], expected[name])


def test_the_same_bits_every_time():
    case = make_case(65, 130, out=70, r=16).to(torch.float32).training()
    y = case.forward()
    g = torch.randn_like(y)
    first = gradients(case, y, g)
    again = gradients(case, case.forward(), g)
    assert torch.equal(y, case.forward()) and all(torch.equal(first[n], again[n]) for n in first)


# ---------------------------------------------------------------- low precision


@LINEARIZATIONS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
def test_low_precision_errs_at_most_twice_as_much_as_the_formula_written_plainly(dtype, b0_is_zero):
    low = make_case(96, 160, out=112, r=16, b0_is_zero=b0_is_zero).to(dtype)
    exact, ours, plain = low.to(torch.float64).training(), low.training(), low.training()
    truth, y, y_plain = exact.plain(), ours.forward(), plain.plain()
    assert_as_accurate(y, y_plain, truth)
    g = torch.randn(y.shape).to(dtype)
    truths, founds, plains = (gradients(c, o, g.to(o.dtype)) for c, o in ((exact, truth), (ours, y), (plain, y_plain)))
    for name in truths:
        assert_as_accurate(founds[name], plains[name], truths[name])


def test_a_step_too_small_for_B0_in_bf16_is_not_lost_in_it():
    """B0 + dB rounds to B0 here; their products with u do not."""
    case = make_case(64, 32, out=24, r=4).to(torch.bfloat16)
    case = replace(case, B0=torch.ones_like(case.B0), dB=torch.full_like(case.dB, 2.0**-10), dA=0 * case.dA)
    assert torch.equal(case.B0 + case.dB, case.B0)
    u = torch.nn.functional.linear(case.x.double(), case.A0.double())
    exact = SCALING * 2.0**-10 * u.sum(-1, keepdim=True).expand(-1, 24)
    moved = case.dual(None)[1].double()
    assert (moved - exact).abs().max() <= 2.0**-7 * exact.abs().max()


def test_an_adapter_in_fp32_beside_a_base_in_bf16():
    case = make_case(33, 40, out=24, r=4).training()
    mixed = replace(case.to(torch.float32), x=case.x.to(torch.bfloat16), weight=case.weight.to(torch.bfloat16),
                    bias=case.bias.to(torch.bfloat16)).training("x", "dA", "dB")  # fmt: skip
    y = mixed.forward()
    assert y.dtype == torch.bfloat16
    found = gradients(mixed, y, torch.ones_like(y))
    assert {name: g.dtype for name, g in found.items()} == {
        "x": torch.bfloat16, "dA": torch.float32, "dB": torch.float32}  # fmt: skip
    assert (y.double() - case.plain()).abs().max() < 0.05


# ---------------------------------------------------------------- what is kept and what is not computed


def saved_shapes(case: Case, **options) -> list[tuple[int, ...]]:
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        case.forward(**options)
    return shapes


def test_with_B0_0_only_u_is_kept_for_the_backward():
    case = make_case(10, 5, r=3, b0_is_zero=True).training("x", "dB")
    assert (10, 3) in saved_shapes(case) and (10, 5) not in saved_shapes(case)
    assert (10, 5) in saved_shapes(case.training())
    assert (10, 5) in saved_shapes(make_case(10, 5, r=3).training("dA"))


def test_a_dropout_mask_is_not_kept():
    case = make_case(10, 5, r=3, b0_is_zero=True).training("x", "dB")
    shapes = saved_shapes(case, dropout=0.5, training=True)
    assert (10, 5) not in shapes and () in shapes


class Shapes(TorchDispatchMode):
    """Records the shape of everything that is computed."""

    def __init__(self):
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        found = function(*arguments, **(options or {}))
        if isinstance(found, torch.Tensor) and "view" not in function.name() and found.dtype.is_floating_point:
            self.seen.add(tuple(found.shape))
        return found


@LINEARIZATIONS
def test_what_is_frozen_gets_no_gradient_computed(b0_is_zero):
    case = make_case(10, 5, out=7, r=3, b0_is_zero=b0_is_zero)

    def computed(*names):
        moving = case.training(*names)
        y = moving.forward()
        with Shapes() as shapes:
            y.backward(torch.ones_like(y))
        return shapes.seen

    assert (7, 5) not in computed("x", "dA", "dB") and (7, 5) in computed("weight", "dB")
    assert (10, 5) not in computed("dA", "dB")


def test_the_closed_form_in_place_is_the_one_out_of_place():
    """What runs without a second derivative, against the formulas that have one."""
    case = make_case(10, 5).training()
    y, u = forward_reference(*case.arguments(), SCALING)
    g = torch.randn_like(y)
    found = gradients(case, case.forward(), g)
    c = case
    expected = backward_reference(g, None, c.x, u, c.weight, c.A0, c.dA, c.B0, c.dB, SCALING, None, [True] * 5)
    assert_close(case.forward(), y)
    for name, gradient in zip(("x", "weight", "bias", "dA", "dB"), expected, strict=True):
        assert_close(found[name], gradient)
