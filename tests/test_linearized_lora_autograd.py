"""Linearized LoRA under what PyTorch does to functions: derivatives of any order and mode, vmap, compile, autocast."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from linearized_lora_cases import SCALING, Case, assert_close, gradients, make_case
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils._pytree import tree_leaves

from peta_fast.errors import CompatibilityError
from peta_fast.ops.linearized_lora import linearized_lora, linearized_lora_dual
from peta_fast.ops.linearized_lora.reference import dual_reference, forward_reference

LINEARIZATIONS = pytest.mark.parametrize("b0_is_zero", [False, True], ids=["general", "b0_is_zero"])


def small_case(b0_is_zero: bool, *names: str, rows: tuple[int, ...] = (3,)) -> Case:
    return make_case(*rows, 4, out=3, r=2, b0_is_zero=b0_is_zero).training(*names)


def function_of(case: Case, names, **options):
    """y of the named arguments, the others as they are in the case."""
    return lambda *values: replace(case, **dict(zip(names, values, strict=True))).forward(**options)


def dual_of(case: Case, names):
    return lambda dx, *values: replace(case, **dict(zip(names, values, strict=True))).dual(dx)


# ---------------------------------------------------------------- reverse, forward, and both orders of both


@LINEARIZATIONS
def test_gradients_in_both_modes_and_batched(b0_is_zero):
    case = small_case(b0_is_zero)
    leaves = case.leaves()
    checks = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}
    assert gradcheck(function_of(case, leaves), tuple(leaves.values()), **checks)


@LINEARIZATIONS
def test_second_derivatives(b0_is_zero):
    case = small_case(b0_is_zero)
    leaves = case.leaves()
    assert gradgradcheck(function_of(case, leaves), tuple(leaves.values()), check_fwd_over_rev=True)


@LINEARIZATIONS
def test_second_derivatives_where_x_is_not_kept(b0_is_zero):
    case = small_case(b0_is_zero, "x", "dB")
    leaves = case.leaves()
    assert gradgradcheck(function_of(case, leaves), tuple(leaves.values()))


@LINEARIZATIONS
def test_gradients_and_second_derivatives_of_the_dual(b0_is_zero):
    case = small_case(b0_is_zero)
    leaves = case.leaves()
    inputs = (torch.randn_like(case.x).requires_grad_(), *leaves.values())
    assert gradcheck(dual_of(case, leaves), inputs, check_forward_ad=True)
    assert gradgradcheck(dual_of(case, leaves), inputs)


@LINEARIZATIONS
def test_gradients_and_second_derivatives_with_dropout(b0_is_zero):
    case = small_case(b0_is_zero)
    leaves = case.leaves()

    def function(*values):
        torch.manual_seed(3)
        return function_of(case, leaves, dropout=0.4, training=True)(*values)

    assert gradcheck(function, tuple(leaves.values()), check_forward_ad=True)
    assert gradgradcheck(function, tuple(leaves.values()))


@LINEARIZATIONS
def test_only_transforms_and_forward_mode_pay_for_a_function_that_knows_them(b0_is_zero):
    case = small_case(b0_is_zero)
    assert [type(t.grad_fn).__name__ for t in (case.forward(), case.dual(case.x)[1])] == [
        "EagerLinearizedLoRABackward",
        "EagerDualBackward",
    ]
    with forward_ad.dual_level():
        assert type(case.forward().grad_fn).__name__ == "LinearizedLoRABackward"


# ---------------------------------------------------------------- transforms of functions


def both(case: Case, names, transform):
    """What a transform makes of the operation, and of the plain formula in its place."""

    def plain(*values):
        moved = replace(case, **dict(zip(names, values, strict=True)))
        return forward_reference(*moved.arguments(), SCALING)[0]

    values = [getattr(case, name) for name in names]
    found = transform(function_of(case, names))(*values), transform(plain)(*values)
    return zip(*(tree_leaves(f) for f in found), strict=True)


def jvp_of(function):
    return lambda *values: torch.func.jvp(function, values, tuple(v.cos() for v in values))


TRANSFORMS = {
    "jvp": (jvp_of, ("x", "dB")),
    "jvp_of_everything": (jvp_of, ("x", "weight", "bias", "dB")),
    "grad": (lambda f: torch.func.grad(lambda *v: f(*v).sin().sum(), (0, 1)), ("x", "dB")),
    "vjp": (lambda f: lambda *v: torch.func.vjp(f, *v)[1](f(*v).sin()), ("x", "dB")),
    "vmap_over_x": (torch.vmap, ("x",)),
    "vmap_over_both": (lambda f: lambda x, dB: torch.vmap(f)(x, torch.stack([dB, 2 * dB, dB.sin()])), ("x", "dB")),
    "grad_per_example": (
        lambda f: lambda x, dB: torch.vmap(torch.func.grad(lambda d, x: f(x, d).sin().sum()), (None, 0))(dB, x),
        ("x", "dB"),
    ),
    "grad_of_vmap": (lambda f: torch.func.grad(lambda x: torch.vmap(f)(x).sin().sum()), ("x",)),
    "jacfwd": (torch.func.jacfwd, ("dB",)),
    "jacrev": (torch.func.jacrev, ("dB",)),
    "hessian": (lambda f: torch.func.hessian(lambda *v: f(*v).sin().sum(), (0, 1)), ("x", "dB")),
}


@LINEARIZATIONS
@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_gives_what_it_gives_of_the_plain_formula(name, b0_is_zero):
    transform, arguments = TRANSFORMS[name]
    case = small_case(b0_is_zero, "weight").to(torch.float64)
    for found, expected in both(case, arguments, transform):
        assert_close(found, expected)


def test_transforms_along_dA():
    case = small_case(False).to(torch.float64)
    for transform in (jvp_of, torch.func.jacrev, torch.func.jacfwd):
        for found, expected in both(case, ("dA",), transform):
            assert_close(found, expected)


@LINEARIZATIONS
def test_transforms_of_the_dual(b0_is_zero):
    case = small_case(b0_is_zero).to(torch.float64)
    dx = torch.randn_like(case.x)

    def ours(x, dx, dB):
        return replace(case, x=x, dB=dB).dual(dx)

    def plain(x, dx, dB):
        moved = replace(case, dB=dB).arguments()
        return dual_reference(x, dx, *moved[1:], SCALING)[:2]

    for transform in (jvp_of, lambda f: torch.vmap(f, (0, 0, None)), lambda f: torch.func.jacrev(f, (0, 1, 2))):
        found, expected = (tree_leaves(transform(f)(case.x, dx, case.dB)) for f in (ours, plain))
        for f, e in zip(found, expected, strict=True):
            assert_close(f, e)


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_dropout_under_vmap(randomness):
    case = make_case(40, 8, r=4, b0_is_zero=True)
    dropping = torch.vmap(function_of(case, ("x",), dropout=0.5, training=True), randomness=randomness)
    first, second = dropping(case.x.expand(2, 40, 8))
    assert torch.equal(first, second) == (randomness == "same")
    assert not torch.allclose(first, case.forward())


def test_dropout_under_vmap_asks_for_the_kind_of_randomness():
    case = make_case(4, 8, b0_is_zero=True)
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(function_of(case, ("x",), dropout=0.5, training=True))(case.x)


# ---------------------------------------------------------------- tangents are there, or it raises


@LINEARIZATIONS
@pytest.mark.parametrize("name", ["x", "weight", "bias", "dA", "dB"])
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_no_tangent_is_lost(name, b0_is_zero, trained):
    if b0_is_zero and name == "dA":
        pytest.skip("no dA there")
    case = small_case(b0_is_zero, *([name] if trained else ["weight"]))
    primal = getattr(case, name)
    step, dx = torch.randn_like(primal), torch.randn_like(case.x)
    with forward_ad.dual_level():
        moving = replace(case, **{name: forward_ad.make_dual(primal, step)})
        found = forward_ad.unpack_dual(moving.forward()).tangent
        dual = [forward_ad.unpack_dual(y).tangent for y in moving.dual(dx)]
    assert_close(found, torch.func.jvp(function_of(case, [name]), (primal,), (step,))[1])
    expected = torch.func.jvp(lambda v: replace(case, **{name: v}).dual(dx), (primal,), (step,))[1]
    for ours, theirs in zip(dual, expected, strict=True):
        assert_close(torch.zeros_like(theirs) if ours is None else ours, theirs)
    assert expected[1].abs().max() > 0 or name == "bias"


@LINEARIZATIONS
@pytest.mark.parametrize("operator", ["linearized_lora", "linearized_lora_dual"])
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_an_operator_without_forward_mode_refuses_tangents(operator, b0_is_zero, trained):
    """PyTorch alone would return a zero tangent for the frozen ones."""
    case = small_case(b0_is_zero, *(["x"] if trained else ["weight"]))
    case = case if trained else case.to(torch.float64)
    operation = getattr(torch.ops.peta_fast, operator)
    tail = (None, SCALING, 0.0) if operator == "linearized_lora" else (SCALING,)

    def call(x):
        others = case.arguments()[1:]
        return operation(x, *(() if operator == "linearized_lora" else (None,)), *others, *tail)[0]

    with forward_ad.dual_level(), pytest.raises(CompatibilityError, match=f"{operator}: .* no derivative in forward"):
        call(forward_ad.make_dual(case.x, torch.ones_like(case.x)))
    with pytest.raises(CompatibilityError, match=f"{operator}: .* no derivative in forward"):
        torch.func.jvp(call, (case.x,), (torch.ones_like(case.x),))


@pytest.mark.parametrize("name", ["A0", "B0"])
def test_the_linearization_point_has_no_tangent(name):
    case = small_case(False)
    with pytest.raises(CompatibilityError, match=f"{name} carries a tangent, but the linearization point is fixed"):
        torch.func.jvp(function_of(case, [name]), (getattr(case, name),), (getattr(case, name),))


# ---------------------------------------------------------------- torch.compile


def compiled(function, backend="aot_eager", **options):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=backend, **options)


@LINEARIZATIONS
@pytest.mark.parametrize("names", [("x", "dA", "dB"), ("x", "weight", "bias", "dA", "dB"), ("dB",)], ids=len)
def test_compiled_without_a_graph_break(b0_is_zero, names):
    case = make_case(2, 5, 4, b0_is_zero=b0_is_zero).training(*names)
    leaves = case.leaves()
    y = compiled(function_of(case, leaves))(*leaves.values())
    assert_close(y, case.forward())
    g = torch.randn_like(y)
    expected = gradients(case, case.forward(), g)
    for name, found in gradients(case, y, g).items():
        assert_close(found, expected[name])


@LINEARIZATIONS
def test_the_dual_compiled_without_a_graph_break(b0_is_zero):
    case = make_case(2, 5, 4, b0_is_zero=b0_is_zero).training()
    leaves = case.leaves()
    dx = torch.randn_like(case.x).requires_grad_()
    found = compiled(dual_of(case, leaves))(dx, *leaves.values())
    expected = case.dual(dx)
    grads = [torch.autograd.grad(sum(t.sin().sum() for t in ys), (dx, *leaves.values())) for ys in (found, expected)]
    for ours, theirs in zip((*found, *grads[0]), (*expected, *grads[1]), strict=True):
        assert_close(ours, theirs)


def test_compiled_by_inductor_in_training():
    case = make_case(5, 4, b0_is_zero=True).to(torch.float32).training("x", "dB")

    def function(x, dB):
        return torch.nn.functional.silu(replace(case, x=x, dB=dB).forward())

    y = compiled(function, backend="inductor")(case.x, case.dB)
    expected = function(case.x, case.dB)
    assert_close(y, expected, 1e-6)
    for ours, theirs in zip(
        torch.autograd.grad(y.sum(), (case.x, case.dB)),
        torch.autograd.grad(expected.sum(), (case.x, case.dB)),
        strict=True,
    ):
        assert_close(ours, theirs, 1e-6)


def test_compiled_for_any_number_of_rows():
    case = make_case(3, 4).training()
    leaves = {name: t for name, t in case.leaves().items() if name != "x"}
    function = compiled(function_of(case, ("x", *leaves)), dynamic=True)
    for rows in (2, 7, 20):
        x = torch.randn(rows, 4, dtype=torch.float64, requires_grad=True)
        y = function(x, *leaves.values())
        assert_close(y, replace(case, x=x).forward())
        y.sum().backward()


def test_a_jvp_compiled_with_the_operation_in_it():
    case = small_case(True).to(torch.float64)

    def function(x, dB):
        return torch.func.jvp(function_of(case, ("x", "dB")), (x, dB), (x.sin(), dB.cos()))

    for ours, theirs in zip(compiled(function)(case.x, case.dB), function(case.x, case.dB), strict=True):
        assert_close(ours, theirs)


def test_compiled_with_dropout_draws_anew_every_time():
    case = make_case(50, 4, b0_is_zero=True).training("x", "dB")
    function = compiled(function_of(case, ("x", "dB"), dropout=0.5, training=True))
    first, second = function(case.x, case.dB), function(case.x, case.dB)
    assert not torch.equal(first, second)
    (gx,) = torch.autograd.grad(first, case.x, torch.ones_like(first))
    low_rank = SCALING * case.dB.sum(0) @ case.A0
    kept = (gx - case.weight.sum(0)) / low_rank
    assert_close(kept, (kept > 1).double() * 2, 1e-9)


@LINEARIZATIONS
def test_the_operators_pass_pytorchs_own_checks(b0_is_zero):
    case = small_case(b0_is_zero)
    x, *others = case.arguments()
    torch.library.opcheck(torch.ops.peta_fast.linearized_lora.default, (x, *others, None, SCALING, 0.0))
    torch.library.opcheck(
        torch.ops.peta_fast.linearized_lora_dual.default, (x, x.detach().sin().requires_grad_(), *others, SCALING)
    )
    plain = [None if t is None else t.detach() for t in case.arguments()]
    u = plain[0] @ plain[3].t()
    gdy = torch.randn(3, 3).double()
    for gy0, wanted in ((gdy.cos(), [True, True, not b0_is_zero, True]), (None, [False, True, False, True])):
        torch.library.opcheck(
            torch.ops.peta_fast.linearized_lora_dual_backward.default,
            (gy0, gdy, plain[0], u, plain[1], *plain[3:], SCALING, wanted),
        )
    needs = [True, not b0_is_zero, True]
    torch.library.opcheck(
        torch.ops.peta_fast.linearized_lora_backward.default,
        (torch.randn(3, 3).double(), plain[0], u, plain[1], *plain[3:], None, SCALING, 0.0, needs),
    )


# ---------------------------------------------------------------- autocast


@LINEARIZATIONS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_under_autocast_as_a_linear_and_gradients_in_each_parameters_dtype(dtype, b0_is_zero):
    case = make_case(6, 5, b0_is_zero=b0_is_zero).to(torch.float32).training()
    with torch.autocast("cpu", dtype=dtype):
        y = case.forward()
        y0, dy = case.dual(torch.randn_like(case.x))
    assert {t.dtype for t in (y, y0, dy)} == {dtype}
    assert (y - case.forward()).abs().max() < 0.05
    g = torch.randn_like(y)
    found = gradients(case, y, g)
    expected = gradients(case, case.forward(), g.float())
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        assert (gradient - expected[name]).abs().max() <= 0.05 * max(1, expected[name].abs().max())


def test_autocast_leaves_fp64_alone():
    case = make_case(6, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(case.forward(), make_case(6, 5).forward())


def test_compiled_under_autocast():
    case = make_case(6, 5).to(torch.float32).training()
    leaves = case.leaves()

    def function(*values):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return function_of(case, leaves)(*values)

    y = compiled(function)(*leaves.values())
    assert torch.equal(y, function(*leaves.values()))
    y.sum().backward()
    assert {t.grad.dtype for t in leaves.values()} == {torch.float32}


# ---------------------------------------------------------------- what is refused


def refused(match: str, **changes) -> None:
    case = make_case(6, 5, out=7, r=3)
    arguments = {**case.tensors(), "scaling": 1.0, **changes}
    with pytest.raises(CompatibilityError, match=match):
        linearized_lora(**arguments)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"x": torch.zeros(6, 4).double()}, r"x is \[6, 4\], expected \[\*, 5\] for weight \[7, 5\]"),
        ({"x": torch.zeros(()).double()}, r"x is \[\], expected \[\*, 5\]"),
        ({"weight": torch.zeros(35).double()}, r"weight is \[35\], expected \[out, in\]"),
        ({"bias": torch.zeros(5).double()}, r"bias is \[5\], expected \[7\]"),
        ({"A0": torch.zeros(0, 5).double()}, r"A0 is \[0, 5\], expected \[r, 5\] with r >= 1"),
        ({"A0": torch.zeros(3, 6).double()}, r"A0 is \[3, 6\], expected \[3, 5\]"),
        ({"dA": torch.zeros(2, 5).double()}, r"dA is \[2, 5\], expected \[3, 5\] for weight \[7, 5\] and rank 3"),
        ({"B0": torch.zeros(3, 7).double()}, r"B0 is \[3, 7\], expected \[7, 3\]"),
        ({"dB": torch.zeros(7, 4).double()}, r"dB is \[7, 4\], expected \[7, 3\]"),
        ({"dA": None}, "B0 is given without dA"),
        ({"B0": None}, "dA is given without B0"),
        ({"weight": torch.zeros(7, 5)}, "weight is torch.float32, x is torch.float64"),
        ({"bias": torch.zeros(7).half()}, "bias is torch.float16, x is torch.float64"),
        ({"x": torch.zeros(6, 5).long()}, "x is torch.int64"),
        ({"dB": torch.zeros(7, 3).long()}, "dB is torch.int64, expected a floating dtype"),
        ({"dB": torch.zeros(7, 3, device="meta")}, "dB is on meta, x on cpu"),
        ({"A0": torch.zeros(3, 5).requires_grad_()}, "A0 requires a gradient, but the linearization point is fixed"),
        ({"dropout": 1.5}, "dropout is 1.5, expected a probability"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_arguments_that_do_not_fit_are_named(changes, match):
    refused(match, **changes)


def test_a_tangent_that_does_not_fit_its_primal_is_named():
    case = make_case(6, 5)
    with pytest.raises(CompatibilityError, match=r"dx is \[5, 5\] torch.float64 on cpu, x is \[6, 5\]"):
        linearized_lora_dual(case.x, case.x[1:], *case.arguments()[1:], 1.0)
