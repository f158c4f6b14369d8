"""Sums over the task vectors of one tensor: norms, Gram matrix, sign conflicts, non-finite counts, in one pass.

    gram[s, t] = sum_i d_s[i] d_t[i]

fp64 over blocks of 4096 elements in flat order, 32 interleaved lanes, a fixed tree within and over blocks: the result
depends on neither threads nor instruction set. Products of two fp32 values are exact in fp64.
Cost: base and T models read once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from peta_fast.buffers import Buffer
from peta_fast.ops import backend, records


@dataclass(frozen=True)
class TaskStatistics:
    """Statistics of T task vectors over one tensor.

    sums, l1   [T] fp64, sums of d and |d|
    gram       [T, T] fp64
    largest    [T] fp32, max |d| (NaN left out)
    nonfinite, nonzero  [T] int64 counts
    conflicts  [T, T] int64, elements where the two have opposite signs
    any_conflict  elements where any two have
    """

    size: int
    sums: np.ndarray
    l1: np.ndarray
    gram: np.ndarray
    largest: np.ndarray
    nonfinite: np.ndarray
    nonzero: np.ndarray
    conflicts: np.ndarray
    any_conflict: int

    @property
    def l2(self) -> np.ndarray:
        """[T] fp64 Euclidean norms."""
        return np.sqrt(np.diagonal(self.gram))


def task_statistics(
    base: Buffer | None, models: Sequence[Buffer], *, base_kind: int = records.BASE_TENSOR, threads: int = 0
) -> TaskStatistics:
    """Statistics of models[t] - base. base_kind BASE_ZERO takes the models as they are."""
    size = models[0].size
    if any(m.size != size for m in models) or (base is not None and base.size != size):
        raise ValueError(f"task_statistics: expected buffers of {size} elements, got {[m.size for m in models]}")
    deltas = np.array([records.delta_record(base, m, base_kind) for m in models], records.DELTA)
    raw = backend(models[0].device).task_statistics(deltas, size, threads)
    count = len(models)
    sums = raw["sums"]
    return TaskStatistics(
        size,
        sums[:count],
        sums[count : 2 * count],
        _symmetric(sums[2 * count :], count, offset=0),
        raw["largest"].view(np.float32),
        raw["nonfinite"],
        raw["nonzero"],
        _symmetric(raw["conflicts"], count, offset=1),
        int(raw["any_conflict"][0]),
    )


def _symmetric(upper: np.ndarray, count: int, offset: int) -> np.ndarray:
    """A symmetric matrix from its upper triangle, row by row; offset 1 leaves the diagonal zero."""
    full = np.zeros((count, count), upper.dtype)
    rows, columns = np.triu_indices(count, offset)
    full[rows, columns] = full[columns, rows] = upper
    return full
