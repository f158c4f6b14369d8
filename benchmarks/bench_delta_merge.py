"""The fused merge pass of T tasks in bf16, thresholds known: reads base + T models, writes one: 2 (T + 2) n bytes.

Floor: a two-thread memcpy that moves as many bytes. Reference: the whole method in plain PyTorch, fp32, kthvalue.
"""

from __future__ import annotations

import numpy as np
import pytest
from floors import address, aligned, copies, seconds
from philox_reference import keep_mask
from ties_reference import BF16_EPS, Tensors, error_of, from_bf16, plain_pytorch

from peta_fast._native import native
from peta_fast.buffers import Buffer
from peta_fast.ops.delta_merge import DeltaMerge, Inputs, Job, Random, Term, Top, merge, prepare

SIZE = 1 << 23
WEIGHT, DENSITY = 0.4, 0.2
NAME = "layer.weight"


@pytest.fixture(scope="module")
def out():
    return aligned(2 * SIZE, fill=0xFF).view(np.uint16)


@pytest.fixture(scope="module")
def scratch():
    return aligned(6 * SIZE * 2)


def ties(tasks: int) -> DeltaMerge:
    term = Term(WEIGHT, Top(max(1, int(DENSITY * SIZE))))
    return DeltaMerge((term,) * tasks, elect="weighted", divide="agreeing-weight")


def task_arithmetic(tasks: int) -> DeltaMerge:
    return DeltaMerge((Term(WEIGHT),) * tasks)


def dare_linear(tasks: int) -> DeltaMerge:
    return DeltaMerge((Term(WEIGHT, Random(DENSITY), 1 / DENSITY),) * tasks)


def ties_error(out, base, models) -> float:
    return error_of(out, Tensors(base, tuple(models)), [DENSITY] * len(models), [WEIGHT] * len(models), "all").largest


def task_arithmetic_error(out, base, models) -> float:
    return _error_of_sum(out, base, [(1.0, m) for m in models])


def dare_linear_error(out, base, models) -> float:
    import torch

    kept = [keep_mask(0, t, NAME, torch.full((SIZE,), DENSITY)).numpy() for t in range(len(models))]
    return _error_of_sum(out, base, [(k / DENSITY, m) for k, m in zip(kept, models, strict=True)])


def _error_of_sum(out, base, terms) -> float:
    """Largest |out - exact| / (2^-7 (|base| + sum of |terms|))."""
    start = from_bf16(base)
    exact, size = start.astype(np.float64), np.abs(start.astype(np.float64))
    for factor, model in terms:
        term = WEIGHT * factor * (from_bf16(model) - start).astype(np.float64)
        exact += term
        size += np.abs(term)
    return float((np.abs(from_bf16(out) - exact) / (BF16_EPS * size)).max())


METHODS = {
    "ties": (ties, ties_error),
    "task_arithmetic": (task_arithmetic, task_arithmetic_error),
    "dare_linear": (dare_linear, dare_linear_error),
}


@pytest.mark.parametrize("tasks", [3, 8], ids="T{}".format)
@pytest.mark.parametrize("method", METHODS)
def bench_delta_merge(measure, bf16_family, buffer_of, out, scratch, method, tasks, simd):
    spec, error = METHODS[method]
    base, models = bf16_family(SIZE, tasks)
    inputs = Inputs(NAME, (SIZE,), buffer_of(base), tuple(map(buffer_of, models)))
    job = Job(prepare([(spec(tasks), inputs)])[0], 0, SIZE, Buffer.from_array(out, "BF16"))
    moved = 2 * (tasks + 2) * SIZE
    out.fill(0xFFFF)
    measure(
        lambda: merge([job]),
        floor=lambda: min(copies(_copy_pairs([base, *models], scratch, moved // 2)).values()),
        floor_name="memcpy that moves as much",
        reference=_plain_ties(base, models) if method == "ties" and simd == native().best_simd() else None,
        reference_name="plain PyTorch, selection included",
        error=lambda: error(out, base, models),
        error_unit="of 2^-7",
        shape=f"T{tasks}, n=2^23, bf16, {simd}",
        nbytes=moved,
    )


def _copy_pairs(inputs, scratch, left: int):
    """(target, source, bytes) of copies of `left` bytes from the inputs, one after another, to places far apart."""
    pairs = []
    for i, array in enumerate(inputs):
        nbytes = min(left, array.nbytes)
        pairs.append((address(scratch) + i % 6 * array.nbytes, address(array), nbytes))
        left -= nbytes
    return [pair for pair in pairs if pair[2]]


def _plain_ties(base, models):
    """() -> seconds"""
    import torch

    def tensor(raw):
        return torch.from_numpy(raw.view(np.int16)).view(torch.bfloat16)

    weights, densities = [WEIGHT] * len(models), [DENSITY] * len(models)
    return lambda: seconds(lambda: plain_pytorch(tensor(base), [tensor(m) for m in models], densities, weights))
