"""Exact k-th magnitudes of T task vectors in bf16.

One streaming pass reads base + T models: 2 (T + 1) n bytes. The histograms of one task, which add up over tensors, read
base and model twice: 8 n bytes. Floor: reading as many bytes with two threads. Reference: torch.kthvalue in fp32.
"""

from __future__ import annotations

import numpy as np
import pytest
from floors import address, reads, seconds
from ties_reference import Tensors

from peta_fast._native import native
from peta_fast.ops.order_statistics import MagnitudeHistogram, Selection, kth_magnitudes

SIZE = 1 << 23
COUNT = int(0.2 * SIZE)


@pytest.mark.parametrize("tasks", [3, 8], ids="T{}".format)
def bench_kth_magnitudes(measure, bf16_family, buffer_of, tasks, simd):
    base, models = bf16_family(SIZE, tasks)
    selections = [Selection(buffer_of(base), buffer_of(m), [COUNT]) for m in models]
    found = []
    measure(
        lambda: found.append(kth_magnitudes(selections)),
        floor=lambda: _read_seconds([base, *models]),
        floor_name="reading base and models once",
        reference=_kthvalue(base, models) if simd == native().best_simd() else None,
        reference_name="torch.kthvalue",
        error=lambda: _error([ranks[0].magnitude for ranks in found[-1]], base, models),
        error_unit="relative",
        shape=f"T{tasks}, n=2^23, bf16, {simd}",
        nbytes=2 * (tasks + 1) * SIZE,
    )


def bench_magnitude_histogram(measure, bf16_family, buffer_of, simd):
    base, models = bf16_family(SIZE, 1)
    found = []

    def threshold():
        histogram = MagnitudeHistogram()
        histogram.add(buffer_of(base), buffer_of(models[0]))
        histogram.narrow([COUNT])
        histogram.add(buffer_of(base), buffer_of(models[0]))
        found.append(histogram.thresholds([COUNT])[0].magnitude)

    measure(
        threshold,
        floor=lambda: 2 * _read_seconds([base, models[0]]),
        floor_name="reading base and model twice",
        reference=_kthvalue(base, models) if simd == native().best_simd() else None,
        reference_name="torch.kthvalue",
        error=lambda: _error(found[-1:], base, models),
        error_unit="relative",
        shape=f"T1, n=2^23, bf16, {simd}",
        nbytes=8 * SIZE,
    )


def _read_seconds(arrays) -> float:
    return min(reads([(address(a), a.nbytes) for a in arrays]).values())


def _error(found, base, models) -> float:
    """Largest relative distance to the magnitudes that a partition finds."""
    tensors = Tensors(base, tuple(models))
    distances = []
    for task, magnitude in enumerate(found):
        ordered = np.partition(np.abs(tensors.delta(task)), SIZE - COUNT)
        exact = float(ordered[SIZE - COUNT])
        distances.append(abs(magnitude - exact) / exact)
    return max(distances)


def _kthvalue(base, models):
    """() -> seconds"""
    import torch

    def tensor(raw):
        return torch.from_numpy(raw.view(np.int16)).view(torch.bfloat16).float()

    def select():
        start = tensor(base)
        for model in models:
            (tensor(model) - start).abs().kthvalue(SIZE - COUNT + 1)

    return lambda: seconds(select)
