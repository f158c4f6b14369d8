"""The merge under a concrete mask: values and gradients against fp64, on paper, by finite differences."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from backends import NATIVE
from concrete_mask_cases import KEY_OF, Case, assert_near, make_case
from philox_reference import uniforms as reference_uniforms
from torch import Tensor

from peta_fast.errors import CompatibilityError
from peta_fast.ops import records
from peta_fast.ops.concrete_mask import Adam, Piece, concrete_merge, dispatch, native, sample_mask, tiles
from peta_fast.ops.concrete_mask.noise import mask_key, uniforms
from peta_fast.ops.concrete_mask.reference import mask_reference, merge_reference

KEY = mask_key(*KEY_OF)
CODES = [
    pytest.param(tiles, id="tiles"),
    pytest.param(native, id="native", marks=pytest.mark.skipif(NATIVE is None, reason="no native module")),
]
SIMD = [] if NATIVE is None else [s for s in ("baseline", "avx2", "avx512") if NATIVE.set_simd(s)]
if NATIVE is not None:
    NATIVE.set_simd("")

# ---------------------------------------------------------------- on paper

LOGITS = torch.tensor([0.0, 1.0, -1.0, 2.0], dtype=torch.float64)
U = torch.tensor([0.5, 0.3, 0.9, 0.1], dtype=torch.float64)
TAU = torch.tensor([1.0, -2.0, 0.5, 4.0], dtype=torch.float64)
BASE = torch.tensor([0.1, 0.2, -0.1, 0.0], dtype=torch.float64)
C = torch.tensor([0.5, -1.0, 2.0, 0.25], dtype=torch.float64)
MASK = torch.tensor([0.5, 0.575763, 0.916403, 0.402647], dtype=torch.float64)
MASKED = torch.tensor([0.835138, -1.923367, 0.765323, 2.690126], dtype=torch.float64)
SLOPE = torch.tensor([0.5, 0.488520, 0.153217, 0.481045], dtype=torch.float64)
THETA = torch.tensor([0.350541, -0.377010, 0.129597, 0.807038], dtype=torch.float64)
LOSS = 0.140372
G_LOGITS = torch.tensor([-0.061395, 0.103138, -0.005642, -0.031559], dtype=torch.float64)
G_LAMBDA = 1.330741


def assert_printed(actual, expected) -> None:
    torch.testing.assert_close(torch.as_tensor(actual).detach().double(), torch.as_tensor(expected).double(),
                               rtol=0, atol=1e-6)  # fmt: skip


def test_the_worked_example_by_the_formulas():
    logits = LOGITS.clone().requires_grad_()
    mask = mask_reference(logits, U)
    assert_printed(mask, MASK)
    assert_printed(mask.mean(), 0.598703)
    assert (mask > 0.5).tolist() == [False, True, True, False]  # 1/2 itself is not above it
    assert_printed(TAU * mask / mask.mean(), MASKED)
    assert_printed(mask * (1 - mask) / 0.5, SLOPE)
    coefficients = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    theta = merge_reference(BASE, [TAU], coefficients, mask)
    loss = 0.5 * (C * theta).square().sum()
    loss.backward()
    assert_printed(theta, THETA)
    assert_printed(loss, LOSS)
    assert_printed(logits.grad, G_LOGITS)
    assert_printed(coefficients.grad, [G_LAMBDA])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_worked_example_by_the_operation(dtype):
    drawn = uniforms(KEY, 0, 4, torch.float64)
    logits = LOGITS + torch.logit(U) - torch.logit(drawn)  # so that the noise it draws makes the mask of the example
    logits = logits.to(dtype).requires_grad_()
    coefficients = torch.tensor([0.3], dtype=dtype, requires_grad=True)
    theta = concrete_merge(BASE.to(dtype), [TAU.to(dtype)], coefficients, logits, key=KEY)
    (0.5 * (C.to(dtype) * theta).square().sum()).backward()
    assert_printed(sample_mask(logits, key=KEY), MASK)
    assert_printed(theta, THETA)
    assert_printed(logits.grad, G_LOGITS)
    assert_printed(coefficients.grad, [G_LAMBDA])


def test_the_closed_form_is_what_autograd_finds():
    case = make_case(40, tasks=2, temperature=0.7)
    exact = case.exact()
    logits = case.logits.double().requires_grad_()
    coefficients = case.coefficients.double().requires_grad_()
    u = torch.from_numpy(reference_uniforms(*KEY_OF, 40)).double().clamp(2.0**-23, 1 - 2.0**-23)
    vectors = [t.double() for t in case.task_vectors]
    theta = merge_reference(case.base.double(), vectors, coefficients, mask_reference(logits, u, 0.7))
    found = torch.autograd.grad(theta, [logits, coefficients], case.g.double())
    for ours, expected in zip(found, (exact.g_logits, exact.g_coefficients), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-15)


# ---------------------------------------------------------------- finite differences


@pytest.mark.parametrize("temperature", [0.5, 1.3])
def test_gradients_agree_with_finite_differences_in_fp64(temperature):
    case = make_case(3, 4, tasks=2).to(torch.float64)
    coefficients = case.coefficients.double().requires_grad_()
    leaves = (case.base.requires_grad_(), coefficients, case.logits.double().requires_grad_())

    def merged(base: Tensor, coefficients: Tensor, logits: Tensor) -> Tensor:
        vectors = [100 * t for t in case.task_vectors]
        return concrete_merge(base, vectors, coefficients, logits, key=KEY, temperature=temperature)

    assert torch.autograd.gradcheck(merged, leaves, eps=1e-6, atol=1e-8, rtol=1e-6)


# ---------------------------------------------------------------- against fp64, in every dtype


def piece_of(case: Case, **more) -> Piece:
    out = torch.full_like(case.base, math.nan)
    return Piece(case.task_vectors, case.coefficients, case.logits, KEY, case.base, out, case.g.clone(), **more)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "size, tasks, temperature",
    [((1,), 1, 0.5), ((3, 5), 2, 0.5), ((4097,), 3, 0.8), ((70, 200), 5, 0.5), ((0,), 2, 0.5)],
    ids=str,
)
def test_every_pass_is_accurate(code, dtype, size, tasks, temperature):
    case = make_case(*size, tasks=tasks, temperature=temperature, dtype=dtype)
    exact, piece = case.exact(), piece_of(case)
    mask = torch.full_like(case.logits, math.nan)
    code.sample(case.logits, KEY, temperature, mask)
    assert_near(mask, exact.mask, 1e-6)
    (piece.mean,) = code.means([piece], temperature)
    if case.logits.numel():
        torch.testing.assert_close(piece.mean, exact.mask.mean(), rtol=1e-6, atol=0)
    code.merge([piece], temperature)
    assert piece.out.dtype == dtype
    assert_near(piece.out, exact.theta, 1e-6 + torch.finfo(dtype).eps / 2)
    (g_coefficients,) = code.coefficient_gradients([piece], temperature)
    assert g_coefficients.dtype == torch.float64
    assert_near(g_coefficients, exact.g_coefficients, 3e-6)
    shift = dispatch.shift_of(case.coefficients, g_coefficients, piece.mean, case.g.numel())
    (g_logits,) = code.logit_gradients([piece], [shift], temperature)
    assert_near(g_logits, exact.g_logits, 3e-6, exact.terms)


@pytest.mark.parametrize("code", CODES)
def test_a_model_of_several_tensors_goes_in_one_call(code):
    cases = [make_case(*size, tasks=tasks) for size, tasks in [((5000,), 2), ((7,), 3), ((33, 3), 1)]]
    pieces = [piece_of(case) for case in cases]
    for piece, mean in zip(pieces, code.means(pieces, 0.5), strict=True):
        piece.mean = mean
    code.merge(pieces, 0.5)
    gradients = code.coefficient_gradients(pieces, 0.5)
    for case, piece, found in zip(cases, pieces, gradients, strict=True):
        assert_near(piece.out, case.exact().theta, 1e-6)
        assert_near(found, case.exact().g_coefficients, 1e-5)


@pytest.mark.parametrize("code", CODES)
def test_the_product_of_the_first_pass_serves_the_second(code):
    case = make_case(70, 100, tasks=4)
    exact, piece = case.exact(), piece_of(case)
    (piece.mean,) = code.means([piece], 0.5)
    (found,) = code.coefficient_gradients([piece], 0.5, products=True)
    assert_near(found, exact.g_coefficients, 3e-6)
    shift = dispatch.shift_of(case.coefficients, found, piece.mean, piece.size)
    rest = Piece(logits=case.logits, key=KEY, g=piece.g, mean=piece.mean)
    (g_logits,) = code.logit_gradients([rest], [shift], 0.5)
    assert_near(g_logits, exact.g_logits, 3e-6, exact.terms)


@pytest.mark.parametrize("code", CODES)
def test_without_logits_it_is_task_arithmetic(code):
    case = make_case(41, 101)
    piece = Piece(case.task_vectors, case.coefficients, None, 0, case.base, torch.empty_like(case.base), case.g)
    dispatch.means([piece], 0.5)
    code.merge([piece], 0.5)
    exact = case.base.double() + sum(
        c.double() * t.double() for c, t in zip(case.coefficients, case.task_vectors, strict=True)
    )
    assert_near(piece.out, exact, 1e-6)
    (found,) = code.coefficient_gradients([piece], 0.5)
    dots = torch.stack([(case.g.double() * t.double()).sum() for t in case.task_vectors])
    assert_near(found, dots, 1e-6)


@pytest.mark.parametrize("code", CODES)
def test_fused_adam_is_the_gradient_and_then_adam(code):
    case = make_case(30, 150, tasks=2)
    piece = piece_of(case)
    logits = case.logits.double().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.1)
    moments = (torch.zeros_like(case.logits), torch.zeros_like(case.logits))
    piece.logits = case.logits.clone()
    for step in range(1, 4):
        (piece.mean,) = code.means([piece], 0.5)
        (found,) = code.coefficient_gradients([piece], 0.5)
        shift = dispatch.shift_of(case.coefficients, found, piece.mean, piece.size)
        exact = Case(case.base, case.task_vectors, case.coefficients, logits.detach(), case.g).exact()
        logits.grad = exact.g_logits
        optimizer.step()
        code.adam([piece], [shift], 0.5, [moments], Adam(0.1, step))
        # where a gradient is all rounding Adam's step is too, up to its full length: those few are left out
        sure = exact.g_logits.abs() > 1e-4 * exact.g_logits.abs().max()
        torch.testing.assert_close(piece.logits.double()[sure], logits.detach()[sure], rtol=0, atol=2e-4)
        logits.data.copy_(piece.logits)


# ---------------------------------------------------------------- the same bits everywhere


def bits_of_all_passes(case: Case) -> list[Tensor]:
    piece = piece_of(case)
    (piece.mean,) = native.means([piece], case.temperature)
    native.merge([piece], case.temperature)
    (found,) = native.coefficient_gradients([piece], case.temperature)
    shift = dispatch.shift_of(case.coefficients, found, piece.mean, piece.size)
    moments = (torch.zeros_like(case.logits), torch.zeros_like(case.logits))
    (gradient,) = native.logit_gradients([piece], [shift], case.temperature)
    piece.logits = case.logits.clone()
    native.adam([piece], [shift], case.temperature, [moments], Adam(0.1, 1))
    return [piece.mean, piece.out, found, gradient, piece.logits, *moments]


@pytest.mark.skipif(len(SIMD) < 2, reason="one instruction set")
@pytest.mark.parametrize("temperature", [0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_instruction_sets_and_threads_give_the_same_bits(temperature, dtype):
    case = make_case(100_003, tasks=2, temperature=temperature, dtype=dtype)
    threads, found = torch.get_num_threads(), {}
    try:
        for simd, count in itertools.product(SIMD, (1, 3)):
            NATIVE.set_simd(simd)
            torch.set_num_threads(count)
            found[simd, count] = bits_of_all_passes(case)
    finally:
        NATIVE.set_simd("")
        torch.set_num_threads(threads)
    first, *others = found.values()
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("code", CODES)
def test_extreme_logits_give_masks_of_zero_and_one_and_no_nan(code):
    logits = torch.tensor([-1e4, -60.0, -20.0, 20.0, 60.0, 1e4, math.inf, -math.inf]).repeat(600)
    mask = torch.empty_like(logits)
    code.sample(logits, KEY, 0.5, mask)
    assert torch.isfinite(mask).all() and mask.min() >= 0 and mask.max() <= 1
    assert (mask[logits < -20] < 1e-6).all() and (mask[logits > 20] > 1 - 1e-6).all()


@pytest.mark.parametrize("code", CODES)
def test_a_nan_among_the_logits_stays_one(code):
    logits, mask = torch.tensor([0.0, math.nan, 1.0]), torch.empty(3)
    code.sample(logits, KEY, 0.5, mask)
    assert mask.isnan().tolist() == [False, True, False]


def test_the_noise_is_that_of_the_other_random_methods():
    expected = reference_uniforms(*KEY_OF, 10_000)
    assert torch.equal(uniforms(KEY, 0, 10_000, torch.float64), torch.from_numpy(expected).double().clamp(2.0**-23))
    assert torch.equal(uniforms(KEY, 4096, 5001, torch.float32), uniforms(KEY, 0, 5001, torch.float32)[4096:])


# ---------------------------------------------------------------- what must hold


def test_at_a_high_temperature_it_is_task_arithmetic():
    case = make_case(50, 60)
    theta = concrete_merge(case.base, case.task_vectors, case.coefficients, case.logits, key=KEY, temperature=1e6)
    plain = concrete_merge(case.base, case.task_vectors, case.coefficients, None, key=KEY)
    assert_near(theta, plain.double(), 1e-5)


def test_a_constant_mask_changes_nothing():
    mask = mask_reference(torch.full((9,), 0.7), torch.full((9,), 0.2))
    tau = torch.randn(9)
    assert_near(merge_reference(torch.zeros(9), [tau], torch.ones(1), mask), tau.double(), 1e-6)


def test_the_rescaled_mask_sums_to_the_number_of_elements():
    ones = torch.ones(5000)
    theta = concrete_merge(torch.zeros(5000), [ones], torch.ones(1), make_case(5000).logits, key=KEY)
    assert theta.double().sum().item() == pytest.approx(5000, rel=1e-6)


@pytest.mark.parametrize("logit", [-30.0, -3.0, 0.0, 5.0])
def test_one_element_is_never_changed_by_its_mask(logit):
    logits = torch.tensor([logit], requires_grad=True)
    theta = concrete_merge(torch.tensor([1.0]), [torch.tensor([0.5])], torch.tensor([2.0]), logits, key=KEY)
    theta.backward()
    assert theta.item() == pytest.approx(2.0, rel=1e-6)
    assert logits.grad.abs().item() < 1e-6


def test_a_mask_that_keeps_nothing_gives_the_base():
    base = torch.tensor([1.0, 2.0], dtype=torch.float64)
    logits = torch.full((2,), -1e6, dtype=torch.float64, requires_grad=True)
    theta = concrete_merge(
        base, [torch.ones(2, dtype=torch.float64)], torch.ones(1, dtype=torch.float64), logits, key=KEY
    )
    theta.sum().backward()
    assert torch.equal(theta.detach(), base)
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize("logit", [-1.5, 0.0, 1.0])
def test_a_mask_is_above_one_half_as_often_as_the_sigmoid_says(logit, temperature):
    count = 200_000
    bits = sample_mask(torch.full((count,), logit), key=KEY, temperature=temperature, binary=True)
    p = 1 / (1 + math.exp(-logit))
    assert bits.dtype == torch.bool
    assert abs(bits.double().mean().item() - p) < 5 * math.sqrt(p * (1 - p) / count)


def test_draws_and_names_have_noise_of_their_own():
    logits = torch.zeros(1000)
    draws = [sample_mask(logits, key=mask_key(*of)) for of in [(0, 0, "a"), (0, 1, "a"), (1, 0, "a"), (0, 0, "b")]]
    for one, other in itertools.combinations(draws, 2):
        assert abs(torch.corrcoef(torch.stack([one, other]))[0, 1]) < 0.2


# ---------------------------------------------------------------- memory and errors


def test_the_backward_keeps_no_mask_and_no_masked_task_vectors():
    case = make_case(64, 64, tasks=5)
    logits, kept = case.logits.clone().requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        concrete_merge(case.base, case.task_vectors, case.coefficients, logits, key=KEY)
    given = {t.data_ptr() for t in (*case.task_vectors, case.coefficients, logits)}
    assert sum(t.numel() for t in kept if t.data_ptr() not in given) == 1  # the mean


@pytest.mark.parametrize("strided", ["base", "task_vectors", "logits"])
def test_strided_tensors_give_the_same(strided):
    case = make_case(40, 30)
    expected = concrete_merge(case.base, case.task_vectors, case.coefficients, case.logits, key=KEY)
    given = {"base": case.base, "task_vectors": case.task_vectors, "logits": case.logits}
    turn = lambda t: t.t().contiguous().t()  # noqa: E731
    given[strided] = [turn(t) for t in given[strided]] if strided == "task_vectors" else turn(given[strided])
    found = concrete_merge(coefficients=case.coefficients, key=KEY, **given)
    assert found.is_contiguous()
    assert_near(found, expected.double(), 1e-6)


GOOD = {
    "base": torch.zeros(3),
    "task_vectors": [torch.zeros(3)],
    "coefficients": torch.ones(1),
    "logits": torch.zeros(3),
}


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"task_vectors": []}, "got no task vectors"),
        ({"coefficients": torch.ones(2)}, r"coefficients is \[2\], expected \[1\]"),
        ({"logits": torch.zeros(4)}, r"logits is \[4\] on cpu, base is \[3\]"),
        ({"task_vectors": [torch.zeros(3, 1)]}, r"task_vectors\[0\] is \[3, 1\]"),
        ({"task_vectors": [torch.zeros(3, dtype=torch.int64)]}, "is torch.int64, expected a floating dtype"),
        ({"logits": torch.zeros(3, dtype=torch.bfloat16)}, "keep logits in fp32"),
        ({"temperature": 0.0}, "temperature is 0.0, expected one above 0"),
    ],
    ids=lambda v: "" if isinstance(v, str) else next(iter(v)),
)
def test_what_does_not_fit_is_refused(changed, message):
    with pytest.raises(CompatibilityError, match=message):
        concrete_merge(**{**GOOD, **changed}, key=KEY)


@pytest.mark.skipif(NATIVE is None, reason="no native module")
@pytest.mark.parametrize(
    "mode, changed, message",
    [
        (5, {}, "unknown mode"),
        (native.MERGE, {"size": -1}, "size is negative"),
        (native.MERGE, {"tasks": 2}, "tasks out of range"),
        (native.MERGE, {"out": 0}, "no output"),
        (native.MERGE, {"g_dtype": 7}, "unknown dtype code 7"),
        (native.REDUCE, {}, "sums out of range"),
        (native.UPDATE, {"g": 0}, "no gradient to start from"),
        (native.UPDATE, {}, "no place for the update"),
    ],
)
def test_native_code_refuses(mode, changed, message):
    memory = torch.zeros(8)
    layouts = (records.MASK_TENSOR, records.MASK_TASK, records.MASK_SETTINGS)
    tensors, tasks, settings = (np.zeros(1, layout) for layout in layouts)
    tasks["x"], settings["temperature"] = memory.data_ptr(), 0.5
    for field in ("logits", "base", "out", "g"):
        tensors[field] = memory.data_ptr()
    tensors["size"], tensors["tasks"] = 8, 1
    for field, value in changed.items():
        tensors[field] = value
    with pytest.raises(ValueError, match=message):
        NATIVE.concrete_mask(mode, tensors, tasks, settings, np.zeros(0), 1)
