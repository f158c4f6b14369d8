"""Norms, inner products and sign conflicts of T task vectors in bf16: reads base + T models once, 2 (T + 1) n bytes.

Floor: reading as many bytes with two threads. Reference: the same sums in plain PyTorch, fp64.
"""

from __future__ import annotations

import numpy as np
import pytest
from floors import address, reads, seconds
from ties_reference import Tensors

from peta_fast._native import native
from peta_fast.ops.task_statistics import task_statistics

SIZE = 1 << 23


@pytest.mark.parametrize("tasks", [3, 8], ids="T{}".format)
def bench_task_statistics(measure, bf16_family, buffer_of, tasks, simd):
    base, models = bf16_family(SIZE, tasks)
    found = []
    measure(
        lambda: found.append(task_statistics(buffer_of(base), list(map(buffer_of, models)))),
        floor=lambda: min(reads([(address(a), a.nbytes) for a in (base, *models)]).values()),
        floor_name="reading base and models once",
        reference=_plain(base, models) if simd == native().best_simd() else None,
        reference_name="plain PyTorch",
        error=lambda: _error(found[-1].gram, base, models),
        error_unit="of the norms",
        shape=f"T{tasks}, n=2^23, bf16, {simd}",
        nbytes=2 * (tasks + 1) * SIZE,
    )


def _error(gram, base, models) -> float:
    """Largest |gram[s, t] - exact| / (|d_s| |d_t|) over three pairs, sums in extended precision."""
    tensors = Tensors(base, tuple(models))
    first, last = (tensors.delta(t).astype(np.longdouble) for t in (0, len(models) - 1))
    exact = {(0, 0): first @ first, (0, -1): first @ last, (-1, -1): last @ last}
    norms = {0: np.sqrt(exact[0, 0]), -1: np.sqrt(exact[-1, -1])}
    return float(max(abs(gram[s, t] - value) / (norms[s] * norms[t]) for (s, t), value in exact.items()))


def _plain(base, models):
    """() -> seconds"""
    import torch

    def tensor(raw):
        return torch.from_numpy(raw.view(np.int16)).view(torch.bfloat16).float()

    def statistics():
        start = tensor(base)
        deltas = torch.stack([tensor(model) - start for model in models])
        wide = deltas.double()
        signs = deltas.sign()
        conflicts = [int((one * other < 0).sum()) for i, one in enumerate(signs) for other in signs[:i]]
        return wide @ wide.T, wide.sum(1), wide.abs().sum(1), deltas.abs().amax(1), (deltas != 0).sum(1), conflicts

    return lambda: seconds(statistics)
