"""Statistics of one stored tensor, in one pass of native code where the dtype has one.

min, max   from the bits: floats of one sign are ordered as their codes are
mean, norm fp64; zeros, nonfinite are counts
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from peta_fast.buffers import ITEMSIZE, MERGEABLE, Buffer, is_floating
from peta_fast.cli._checkpoints import raw_bytes, tiles, values


@dataclass(frozen=True)
class Statistics:
    """min and max are None for an empty or complex tensor."""

    min: float | None
    max: float | None
    mean: float
    norm: float
    zeros: int
    nonfinite: int


def statistics(buffer: Buffer) -> Statistics:
    """Of all elements; NaN where NaN is among them."""
    sum_, squares, zeros, nonfinite = _native_sums(buffer) if buffer.dtype in MERGEABLE else _sums(buffer)
    low, high = extremes(buffer)
    return Statistics(low, high, sum_ / max(buffer.size, 1), float(np.sqrt(squares)), zeros, nonfinite)


def nonfinite(buffer: Buffer) -> int:
    """NaN and infinities among the elements."""
    if not (is_floating(buffer.dtype) or buffer.dtype == "C64"):
        return 0
    return (_native_sums(buffer) if buffer.dtype in MERGEABLE else _sums(buffer))[3]


def extremes(buffer: Buffer) -> tuple[float | None, float | None]:
    """The least and the greatest element."""
    if buffer.size == 0 or buffer.dtype == "C64":
        return None, None
    if not is_floating(buffer.dtype) or buffer.dtype == "F8_E8M0":
        found = [values(buffer.slice(*tile)) for tile in tiles(buffer.size)]
        return float(min(v.min() for v in found)), float(max(v.max() for v in found))
    codes = raw_bytes(buffer).view(f"<u{ITEMSIZE[buffer.dtype]}")
    least, greatest, signed = codes.min(), codes.max(), codes.view(f"<i{ITEMSIZE[buffer.dtype]}").max()
    low = greatest if greatest >> (8 * codes.itemsize - 1) else least
    high = signed.view(codes.dtype) if signed >= 0 else least
    return _decoded(low, buffer.dtype), _decoded(high, buffer.dtype)


def _decoded(code: np.unsignedinteger, dtype: str) -> float:
    return float(values(Buffer.from_array(np.array([code]), dtype))[0])


def _native_sums(buffer: Buffer) -> tuple[float, float, int, int]:
    """Sum, sum of squares, zeros, non-finite elements."""
    from peta_fast.ops.records import BASE_ZERO
    from peta_fast.ops.task_statistics import task_statistics

    if buffer.size == 0:
        return 0.0, 0.0, 0, 0
    found = task_statistics(None, [buffer], base_kind=BASE_ZERO)
    zeros = buffer.size - int(found.nonzero[0])
    return float(found.sums[0]), float(found.gram[0, 0]), zeros, int(found.nonfinite[0])


def _sums(buffer: Buffer) -> tuple[float, float, int, int]:
    """The same for other dtypes, tile by tile."""
    totals = np.zeros(4)
    for tile in tiles(buffer.size):
        found = values(buffer.slice(*tile))
        exact = np.abs(found) if found.dtype.kind == "c" else found.astype(np.float64)
        zeros, odd = np.count_nonzero(found == 0), np.count_nonzero(~np.isfinite(exact))
        totals += exact.sum(), np.square(exact).sum(), zeros, odd
    return float(totals[0]), float(totals[1]), int(totals[2]), int(totals[3])
