"""Several linearized LoRA layers of one x as one operation: equal to the single layers, in value and all gradients."""

from __future__ import annotations

import pytest
import torch
from linearized_lora_cases import assert_as_accurate, assert_close, make_case
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from peta_fast.errors import CompatibilityError
from peta_fast.ops.linearized_lora import Projection, linearized_lora, linearized_lora_group

GENERAL, ZERO, MIXED = (False,) * 3, (True,) * 3, (False, True, False)
KINDS = pytest.mark.parametrize("zeros", [GENERAL, ZERO, MIXED], ids=["general", "b0_is_zero", "mixed"])


def group_of(
    *shape: int, zeros=MIXED, dropouts=(0.0,) * 3, trained=("x", "dA", "dB"), outs=(7, 4, 9), ranks=(3, 2, 1)
) -> tuple[torch.Tensor, list[Projection]]:
    """x and projections of it that differ in out, r, bias, scaling."""
    cases = [
        make_case(*shape, out=outs[i], r=ranks[i], b0_is_zero=zero, bias=i != 1, seed=i).training(*trained)
        for i, zero in enumerate(zeros)
    ]
    numbers = zip((1.5, -0.7, 2.0), dropouts, strict=True)
    return cases[0].x, [Projection(*c.arguments()[1:], *n) for c, n in zip(cases, numbers, strict=False)]


def leaves_of(x, projections) -> list[torch.Tensor]:
    return [t for t in (x, *(t for p in projections for t in p[:6])) if t is not None and t.requires_grad]


def single(x, projections, training=False) -> list[torch.Tensor]:
    return [linearized_lora(x, *p[:7], dropout=p.dropout, training=training) for p in projections]


def gradients_of(ys, leaves) -> list[torch.Tensor]:
    gs = [torch.randn(y.shape, generator=torch.Generator().manual_seed(i), dtype=y.dtype) for i, y in enumerate(ys)]
    return list(torch.autograd.grad(ys, leaves, gs))


def assert_equal_to_single(x, projections, training=False) -> None:
    leaves = leaves_of(x, projections)
    torch.manual_seed(5)
    ours = linearized_lora_group(x, projections, training=training)
    torch.manual_seed(5)
    theirs = single(x, projections, training)
    founds, expecteds = [[*ys, *gradients_of(ys, leaves)] for ys in (ours, theirs)]
    for found, expected in zip(founds, expecteds, strict=True):
        assert_close(found, expected, 1e-12)


def assert_same_or_none(founds, expecteds) -> None:
    for found, expected in zip(founds, expecteds, strict=True):
        assert (found is None) == (expected is None)
        if expected is not None:
            assert_close(found, expected)


@KINDS
@pytest.mark.parametrize("shape", [(6,), (0, 6), (1, 6), (5, 6), (2, 3, 6)], ids=str)
def test_values_and_all_gradients_are_those_of_the_single_layers(shape, zeros):
    assert_equal_to_single(*group_of(*shape, zeros=zeros))


@KINDS
def test_the_gradients_of_weights_and_biases_too(zeros):
    assert_equal_to_single(*group_of(5, 6, zeros=zeros, trained=()))


@KINDS
@pytest.mark.parametrize("trained", [("x",), ("dA",), ("dB",), ("x", "bias")], ids=" ".join)
def test_only_what_is_asked_for(trained, zeros):
    x, projections = group_of(5, 6, zeros=zeros, trained=trained)
    leaves, ys, theirs = leaves_of(x, projections), linearized_lora_group(x, projections), single(x, projections)
    assert [y.requires_grad for y in ys] == [y.requires_grad for y in theirs]
    for y, expected in zip(ys, theirs, strict=True):
        if y.requires_grad:
            losses = y.sin().sum(), expected.sin().sum()
            assert_same_or_none(*(torch.autograd.grad(t, leaves, allow_unused=True, retain_graph=True) for t in losses))


@KINDS
@pytest.mark.parametrize("dropouts", [(0.4, 0.4, 0.4), (0.0, 0.5, 0.0), (0.1, 0.0, 1.0)], ids=str)
def test_dropout_takes_the_masks_of_the_single_layers(dropouts, zeros):
    x, projections = group_of(50, 6, zeros=zeros, dropouts=dropouts)
    assert_equal_to_single(x, projections, training=True)
    torch.manual_seed(0)
    assert not torch.equal(linearized_lora_group(x, projections, training=True)[1], single(x, projections)[1]) or (
        dropouts[1] == 0
    )


def test_dropout_leaves_the_generator_where_the_single_layers_do():
    x, projections = group_of(5, 6, dropouts=(0.4, 0.0, 0.2))
    states = []
    for function in (linearized_lora_group, single):
        torch.manual_seed(5)
        function(x, projections, training=True)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_checkpointing_replays_the_masks():
    x, projections = group_of(50, 6, dropouts=(0.4, 0.4, 0.4))
    leaves = leaves_of(x, projections)
    torch.manual_seed(2)
    expected = gradients_of(linearized_lora_group(x, projections, training=True), leaves)
    torch.manual_seed(2)
    again = checkpoint(lambda x: linearized_lora_group(x, projections, training=True), x, use_reentrant=False)
    for found, wanted in zip(gradients_of(again, leaves), expected, strict=True):
        assert torch.equal(found, wanted)


@KINDS
def test_an_output_that_nobody_uses_has_no_gradients(zeros):
    x, projections = group_of(5, 6, zeros=zeros)
    y = linearized_lora_group(x, projections)[1]
    expected = linearized_lora(x, *projections[1][:7])
    leaves = leaves_of(x, projections)
    assert_same_or_none(*(torch.autograd.grad(t.sin().sum(), leaves, allow_unused=True) for t in (y, expected)))


def test_the_sum_of_the_gradients_of_x_by_hand():
    x = torch.tensor([[1.0, 2.0]], requires_grad=True)
    one = Projection(
        torch.tensor([[1.0, 0.0]]), None, torch.tensor([[1.0, 1.0]]), None, None, torch.tensor([[2.0]]), 1.0
    )
    two = one._replace(weight=torch.tensor([[0.0, 1.0]]), dB=torch.tensor([[3.0]]), scaling=0.5)
    y, z = linearized_lora_group(x, [one, two])
    assert (y.item(), z.item()) == (1.0 + 2.0 * 3.0, 2.0 + 0.5 * 3.0 * 3.0)
    (y + 10 * z).sum().backward()
    assert x.grad.tolist() == [[1 + 2 + 10 * 1.5, 2 + 10 * (1 + 1.5)]]


@KINDS
def test_derivatives_of_both_modes_and_both_orders(zeros):
    x, projections = group_of(2, 3, zeros=zeros, outs=(2, 1, 2), ranks=(1, 2, 1))
    leaves = leaves_of(x, projections)

    def function(*values):
        given = iter(values)
        x_own = next(given)
        own = [Projection(*(next(given) if t is not None and t.requires_grad else t for t in p[:6]), *p[6:])
               for p in projections]  # fmt: skip
        return linearized_lora_group(x_own, own)

    assert gradcheck(function, tuple(leaves), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, tuple(leaves))


def test_functional_transforms_are_those_of_the_single_layers():
    x, projections = group_of(4, 6, trained=("dB",))
    x = x.detach()

    def loss(function):
        return lambda x: sum(y.sin().sum() for y in function(x, projections))

    for transform in (
        lambda f: torch.func.grad(loss(f))(x),
        lambda f: torch.func.jvp(loss(f), (x,), (x.cos(),))[1],
        lambda f: torch.func.vmap(torch.func.grad(loss(f)))(x),
    ):
        assert_close(transform(linearized_lora_group), transform(single))


@KINDS
def test_it_compiles_into_one_graph(zeros):
    x, projections = group_of(5, 6, zeros=zeros)
    leaves = leaves_of(x, projections)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: linearized_lora_group(x, projections), fullgraph=True, backend="aot_eager")
    ys, expected = compiled(x), single(x, projections)
    for found, wanted in zip(
        (*ys, *gradients_of(ys, leaves)), (*expected, *gradients_of(expected, leaves)), strict=True
    ):
        assert_close(found, wanted)


def test_autocast_takes_x_and_the_weights_to_its_dtype():
    x, projections = group_of(64, 6)
    low = [Projection(*(None if t is None else t.detach().float() for t in p[:6]), *p[6:]) for p in projections]
    with torch.autocast("cpu", torch.bfloat16):
        ys, theirs = linearized_lora_group(x.detach().float(), low), single(x.detach().float(), low)
    for y, plain, exact in zip(ys, theirs, single(x, projections), strict=True):
        assert y.dtype == torch.bfloat16
        assert_as_accurate(y, plain, exact)


def test_faults_name_the_projection():
    x, projections = group_of(5, 6)
    wrong = [projections[0], projections[1]._replace(dB=projections[1].dB[:, :1])]
    with pytest.raises(CompatibilityError, match=r"projection 1: dB is \[4, 1\], expected \[4, 2\]"):
        linearized_lora_group(x, wrong)
    with pytest.raises(CompatibilityError, match="got no projections"):
        linearized_lora_group(x, [])


# ---------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@KINDS
@pytest.mark.parametrize("rows", [0, 1, 48, 256, 257, 1000])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_on_a_gpu_as_accurate_as_the_single_layers_and_the_same_bits_every_time(rows, dropout, zeros):
    exact_x, exact = group_of(rows, 520, zeros=zeros, dropouts=(dropout,) * 3, outs=(776, 264, 264), ranks=(16, 8, 33))
    low = lambda t: None if t is None else t.detach().bfloat16().cuda().requires_grad_(t.requires_grad)  # noqa: E731
    wide = lambda t: None if t is None else t.detach().double().requires_grad_(t.requires_grad)  # noqa: E731
    x, projections = low(exact_x), [Projection(*map(low, p[:6]), *p[6:]) for p in exact]
    exact_x, exact = wide(x), [Projection(*map(wide, p[:6]), *p[6:]) for p in projections]

    def run(function, x, projections):
        torch.manual_seed(7)
        ys = function(x, projections, training=True)
        gs = [torch.ones_like(y).cos() * (i + 1) for i, y in enumerate(ys)]
        return [*ys, *torch.autograd.grad(ys, leaves_of(x, projections), gs)]

    ours, again = run(linearized_lora_group, x, projections), run(linearized_lora_group, x, projections)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    theirs, truth = run(single, x, projections), run(single, exact_x, exact)
    for found, plain, right in zip(ours, theirs, truth, strict=True):
        if found.numel():
            assert_as_accurate(found, plain, right)
