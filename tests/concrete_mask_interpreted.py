"""Runs the Triton kernels of concrete masks on the CPU, in Triton's interpreter, against the formulas in fp64.

usage: concrete_mask_interpreted.py

Prints one JSON object: name of the check -> what went wrong, "" for nothing. A process of its own, since Triton must be
told to interpret before it is imported.
"""

from __future__ import annotations

import math
import os

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from concrete_mask_cases import KEY_OF, Case, assert_near, make_case
from interpreter import print_checks

from peta_fast.ops.concrete_mask import Adam, Piece, dispatch, tiles
from peta_fast.ops.concrete_mask.noise import mask_key

KEY = mask_key(*KEY_OF)
NEAR = 1e-6


def piece_of(case: Case) -> Piece:
    out = torch.full_like(case.base, math.nan)
    return Piece(case.task_vectors, case.coefficients, case.logits.clone(), KEY, case.base, out, case.g.clone())


def check_passes(case: Case) -> None:
    """sample, means, merge, both gradients and the product, one after another as in a step."""
    from peta_fast.ops.concrete_mask import launch

    t, exact, piece = case.temperature, case.exact(), piece_of(case)
    mask = torch.full_like(case.logits, math.nan)
    launch.sample(case.logits, KEY, t, mask)
    assert_near(mask, exact.mask, NEAR)
    (piece.mean,) = launch.means([piece], t)
    if piece.size:
        torch.testing.assert_close(piece.mean, exact.mask.mean(), rtol=NEAR, atol=0)
    launch.merge([piece], t)
    assert_near(piece.out, exact.theta, NEAR + torch.finfo(case.base.dtype).eps / 2)
    (g_coefficients,) = launch.coefficient_gradients([piece], t)
    assert_near(g_coefficients, exact.g_coefficients, 3 * NEAR)
    shift = dispatch.shift_of(case.coefficients, g_coefficients, piece.mean, piece.size)
    (g_logits,) = launch.logit_gradients([piece], [shift], t)
    assert_near(g_logits, exact.g_logits, 3 * NEAR, exact.terms)
    if case.g.dtype == torch.float32:
        launch.coefficient_gradients([piece], t, products=True)
        rest = Piece(logits=piece.logits, key=KEY, g=piece.g, mean=piece.mean)
        (g_logits,) = launch.logit_gradients([rest], [shift], t)
        assert_near(g_logits, exact.g_logits, 3 * NEAR, exact.terms)


def check_adam() -> None:
    """Three steps of the kernel and of the tiles end in the same logits and moments."""
    from peta_fast.ops.concrete_mask import launch

    case = make_case(2100, tasks=2)
    found = []
    for code in (launch, tiles):
        piece = piece_of(case)
        moments = (torch.zeros_like(case.logits), torch.zeros_like(case.logits))
        for step in (1, 2, 3):
            (piece.mean,) = code.means([piece], 0.5)
            (sums,) = code.coefficient_gradients([piece], 0.5)
            shift = dispatch.shift_of(case.coefficients, sums, piece.mean, piece.size)
            code.adam([piece], [shift], 0.5, [moments], Adam(0.1, step))
        found.append((piece.logits, *moments))
    sure = (
        found[1][1].abs() > 1e-4 * found[1][1].abs().max()
    )  # elsewhere a gradient is all rounding, and Adam's step too
    assert sure.double().mean() > 0.5
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours[sure], theirs[sure], rtol=1e-3, atol=1e-4)


def check_without_logits() -> None:
    from peta_fast.ops.concrete_mask import launch

    case = make_case(33, 70)
    piece = piece_of(case)
    piece.logits, piece.mean, piece.base = None, torch.ones((), dtype=torch.float64), None
    launch.merge([piece], 0.5)
    exact = sum(c.double() * x.double() for c, x in zip(case.coefficients, case.task_vectors, strict=True))
    assert_near(piece.out, exact, NEAR)
    (dots,) = launch.coefficient_gradients([piece], 0.5)
    assert_near(dots, torch.stack([(case.g.double() * x.double()).sum() for x in case.task_vectors]), NEAR)


def check_a_mask_that_keeps_nothing() -> None:
    from peta_fast.ops.concrete_mask import launch

    case = make_case(50)
    piece = piece_of(case)
    piece.logits.fill_(-1000.0)
    (piece.mean,) = launch.means([piece], 0.5)
    assert piece.mean.item() == 0
    launch.merge([piece], 0.5)
    assert torch.equal(piece.out, case.base)
    (sums,) = launch.coefficient_gradients([piece], 0.5)
    assert not sums.any()


def check_keys_of_all_sizes() -> None:
    """Halves with and without the highest bit."""
    from peta_fast.ops.concrete_mask import launch

    logits = torch.zeros(100)
    for key in (0, 5, 2**31, 2**32 - 1, 2**63, 2**64 - 1):
        ours, theirs = torch.empty(100), torch.empty(100)
        launch.sample(logits, key, 0.5, ours)
        tiles.sample(logits, key, 0.5, theirs)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


CHECKS = {
    "adam": check_adam,
    "without_logits": check_without_logits,
    "keeps_nothing": check_a_mask_that_keeps_nothing,
    "keys": check_keys_of_all_sizes,
}
CHECKS |= {
    f"passes-{'x'.join(map(str, size))}-T{tasks}-{temperature}-{str(dtype).removeprefix('torch.')}": (
        lambda s=size, k=tasks, t=temperature, d=dtype: check_passes(make_case(*s, tasks=k, temperature=t, dtype=d))
    )
    for size, tasks, temperature, dtype in [
        ((1,), 1, 0.5, torch.float32), ((3, 5), 2, 0.5, torch.float32), ((2048,), 3, 0.8, torch.float32),
        ((43, 101), 5, 0.5, torch.float32), ((0,), 2, 0.5, torch.float32), ((43, 101), 2, 1.7, torch.float16),
    ]
}  # fmt: skip


if __name__ == "__main__":
    print_checks(CHECKS)
