"""Linearized LoRA on a GPU: the Triton kernels and cuBLAS against fp64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from linearized_lora_cases import SCALING, Case, assert_as_accurate, gradients, make_case
from torch.utils.checkpoint import checkpoint

from peta_fast.ops.linearized_lora import blocks
from peta_fast.ops.linearized_lora.dropout import keep_factors
from peta_fast.ops.linearized_lora.reference import dual_reference
from peta_fast.ops.linearized_lora.tuning import tune

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("error:linearized_lora. Triton builds no kernels"),
]
LINEARIZATIONS = pytest.mark.parametrize("b0_is_zero", [False, True], ids=["general", "b0_is_zero"])
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
ROWS = (0, 1, 16, 33, 64, 200, 256, 257, 1000)


def on_gpu(*shape: int, dtype=torch.bfloat16, **options) -> Case:
    return make_case(*shape, **options).to(dtype).to("cuda")


def three_ways(case: Case, names=("x", "dA", "dB")) -> tuple[Case, Case, Case]:
    """In fp64 from the same rounded numbers, and twice as given."""
    return case.to(torch.float64).training(*names), case.training(*names), case.training(*names)


def assert_all_as_accurate(case: Case) -> None:
    exact, ours, plain = three_ways(case)
    truth, y, y_plain = exact.plain(), ours.forward(), plain.plain()
    g = torch.randn(y.shape, device="cuda").to(y.dtype)
    founds = gradients(ours, y, g)
    truths, plains = gradients(exact, truth, g.double()), gradients(plain, y_plain, g)
    if case.x.shape[0]:
        assert_as_accurate(y, y_plain, truth)
        for name, found in founds.items():
            assert_as_accurate(found, plains[name], truths[name])
    else:
        assert y.shape == truth.shape and all(not founds[n].any() for n in founds)


@LINEARIZATIONS
@DTYPES
@pytest.mark.parametrize("rows", ROWS)
def test_value_and_gradients_for_any_number_of_rows(rows, dtype, b0_is_zero):
    assert_all_as_accurate(on_gpu(rows, 520, out=776, r=16, b0_is_zero=b0_is_zero, dtype=dtype))


@LINEARIZATIONS
@pytest.mark.parametrize("r", [1, 4, 8, 16, 32, 64, 128])
@pytest.mark.parametrize("rows", [48, 640])
def test_value_and_gradients_for_any_rank(r, rows, b0_is_zero):
    assert_all_as_accurate(on_gpu(rows, 512, out=640, r=r, b0_is_zero=b0_is_zero))


@LINEARIZATIONS
@pytest.mark.parametrize("rows", [33, 300])
def test_odd_sizes(rows, b0_is_zero):
    assert_all_as_accurate(on_gpu(rows, 331, out=259, r=5, b0_is_zero=b0_is_zero))


@LINEARIZATIONS
@pytest.mark.parametrize("rows", [1, 20, 64, 256, 700])
@pytest.mark.parametrize("moving", [True, False], ids=["dx", "no_dx"])
def test_the_dual(rows, moving, b0_is_zero):
    case = on_gpu(rows, 520, out=776, r=16, b0_is_zero=b0_is_zero)
    dx = torch.randn_like(case.x) if moving else None
    truth = case.to(torch.float64).jvp_reference().dual(case.x.double(), None if dx is None else dx.double())
    plain = case.jvp_reference()
    for ours, theirs, exact in zip(case.dual(dx), plain.dual(case.x, dx), truth, strict=True):
        assert_as_accurate(ours, theirs, exact)


@LINEARIZATIONS
@pytest.mark.parametrize("with_value", [True, False], ids=["both", "tangent_alone"])
@pytest.mark.parametrize("rows", [1, 48, 640])
def test_gradients_of_the_dual(rows, with_value, b0_is_zero):
    case = on_gpu(rows, 520, out=776, r=16, b0_is_zero=b0_is_zero)
    dx = torch.randn_like(case.x)
    g = [torch.randn(rows, 776, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    chosen = slice(0, 2) if with_value else slice(1, 2)

    def of(case, dx, dual, dtype):
        leaves = {"dx": dx.to(dtype).requires_grad_(), **case.to(dtype).training("x", "dA", "dB").leaves()}
        moved = replace(case.to(dtype), **{n: t for n, t in leaves.items() if n != "dx"})
        ys = dual(moved, leaves["dx"])[chosen]
        return torch.autograd.grad(ys, tuple(leaves.values()), [t.to(dtype) for t in g[chosen]])

    def plain(case, dx):
        return dual_reference(case.x, dx, *case.arguments()[1:], SCALING)[:2]

    founds = of(case, dx, Case.dual, torch.bfloat16)
    plains, truths = of(case, dx, plain, torch.bfloat16), of(case, dx, plain, torch.float64)
    for found, low, truth in zip(founds, plains, truths, strict=True):
        assert_as_accurate(found, low, truth)


def test_tuning_finds_blocks_that_are_right_and_taken_afterwards(tmp_path, monkeypatch):
    file = tmp_path / "found.json"
    monkeypatch.setenv("PETA_FAST_TUNING", str(file))
    blocks.forget()
    entries = tune([(48, 520, 776, 16)], report=lambda line: None)
    place = blocks.place_of(torch.device("cuda", torch.cuda.current_device()))
    for general in (False, True):
        name = blocks.name_of("fused", general)
        key = blocks.key_of(name, place, 48, 776, 520, 16)
        assert blocks.chosen(name, place, 48, 776, 520, 16) == entries[key]["blocks"]
        assert_all_as_accurate(on_gpu(48, 520, out=776, r=16, b0_is_zero=not general))
    monkeypatch.undo()
    blocks.forget()


@LINEARIZATIONS
def test_fp32_by_the_closed_form(b0_is_zero):
    assert_all_as_accurate(on_gpu(300, 520, out=776, r=16, b0_is_zero=b0_is_zero, dtype=torch.float32))


@LINEARIZATIONS
@pytest.mark.parametrize("rows", [48, 640])
def test_a_strided_x_and_a_transposed_weight(rows, b0_is_zero):
    case = on_gpu(rows, 512, out=640, b0_is_zero=b0_is_zero)
    wide = torch.randn(rows, 1024, device="cuda", dtype=torch.bfloat16)
    wide[:, ::2] = case.x
    views = replace(case, x=wide[:, ::2], weight=case.weight.t().contiguous().t())
    exact = case.to(torch.float64).plain()
    assert_as_accurate(views.forward(), case.plain(), exact)


@LINEARIZATIONS
@pytest.mark.parametrize("rows", [48, 640])
def test_an_fp32_adapter_gets_fp32_gradients(rows, b0_is_zero):
    case = on_gpu(rows, 512, out=640, b0_is_zero=b0_is_zero)
    wide = {n: t.float() for n, t in case.tensors().items() if n in ("A0", "dA", "B0", "dB")}
    exact, mixed = case.to(torch.float64).training("x", "dA", "dB"), replace(case, **wide).training("x", "dA", "dB")
    y, truth = mixed.forward(), exact.plain()
    g = torch.randn_like(y)
    found, truths = gradients(mixed, y, g), gradients(exact, truth, g.double())
    for name, gradient in found.items():
        assert gradient.dtype == getattr(mixed, name).dtype
        assert (gradient.double() - truths[name]).abs().max() <= 2.0**-6 * truths[name].abs().max()


@LINEARIZATIONS
@pytest.mark.parametrize("rows", [48, 640])
def test_dropout_takes_the_mask_of_the_cpu(rows, b0_is_zero):
    case = on_gpu(rows, 330, out=640, b0_is_zero=b0_is_zero).training("x", "dA", "dB")
    torch.manual_seed(11)
    seed = torch.randint(-(2**63), 2**63 - 1, (), device="cuda")
    torch.manual_seed(11)
    y = case.forward(dropout=0.25, training=True)
    factors = keep_factors(seed.cpu(), rows, 330, 0.25, torch.float64).cuda()
    exact = case.to(torch.float64).training("x", "dA", "dB")
    adapter = replace(exact, x=exact.x * factors, weight=0 * exact.weight, bias=0 * exact.bias)
    truth = adapter.plain() + torch.nn.functional.linear(exact.x, exact.weight, exact.bias)
    assert (y.double() - truth).abs().max() <= 2.0**-6 * truth.abs().max()
    g = torch.randn_like(y)
    found, truths = gradients(case, y, g), gradients(exact, truth, g.double())
    for name in truths:
        assert (found[name].double() - truths[name]).abs().max() <= 2.0**-6 * truths[name].abs().max()


@LINEARIZATIONS
def test_checkpointing_replays_the_mask(b0_is_zero):
    case = on_gpu(640, 512, out=640, b0_is_zero=b0_is_zero).training("x", "dB")
    torch.manual_seed(2)
    y = case.forward(dropout=0.5, training=True)
    g = torch.randn_like(y)
    expected = gradients(case, y, g)
    torch.manual_seed(2)
    again = checkpoint(lambda x: replace(case, x=x).forward(dropout=0.5, training=True), case.x, use_reentrant=False)
    for name, found in gradients(case, again, g).items():
        assert torch.equal(found, expected[name])


@LINEARIZATIONS
@pytest.mark.parametrize("rows", [48, 640])
def test_the_same_bits_every_time(rows, b0_is_zero):
    case = on_gpu(rows, 512, out=640, b0_is_zero=b0_is_zero).training("x", "dA", "dB")
    y = case.forward()
    g = torch.randn_like(y)
    first = gradients(case, y, g)
    for _ in range(3):
        again = case.forward()
        assert torch.equal(again, y)
        assert all(torch.equal(first[n], t) for n, t in gradients(case, again, g).items())


@LINEARIZATIONS
@pytest.mark.parametrize("rows", [48, 640])
def test_compiled_without_a_graph_break(rows, b0_is_zero):
    case = on_gpu(rows, 512, out=640, b0_is_zero=b0_is_zero).training("x", "dA", "dB")
    names = list(case.leaves())

    def function(*values):
        return replace(case, **dict(zip(names, values, strict=True))).forward()

    torch._dynamo.reset()
    y = torch.compile(function, fullgraph=True)(*case.leaves().values())
    assert torch.equal(y, case.forward())
    g = torch.randn_like(y)
    expected = gradients(case, case.forward(), g)
    for name, found in gradients(case, y, g).items():
        assert torch.equal(found, expected[name])


@LINEARIZATIONS
def test_forward_mode(b0_is_zero):
    case = on_gpu(300, 512, out=640, b0_is_zero=b0_is_zero)
    dx, exact = torch.randn_like(case.x), case.to(torch.float64)

    def of(c):
        return lambda x: replace(c, x=x).forward()

    dy = torch.func.jvp(of(case), (case.x,), (dx,))[1]
    truth = torch.func.jvp(of(exact), (exact.x,), (dx.double(),))[1]
    assert (dy.double() - truth).abs().max() <= 2.0**-6 * truth.abs().max()
