"""Exact algebra of low-rank changes: sums, truncations and KnOTS through QR of the stacked factors and a small SVD.

No dense matrix is formed here. What is no longer of low rank, such as a trimmed change, is factored again by `sketch`,
which looks at it tile by tile.
"""

from __future__ import annotations

from peta_fast.ops.low_rank.algebra import LowRank, Truncated, distance, norm_of, spectrum, stacked, truncated
from peta_fast.ops.low_rank.compat import linear_peft, shares
from peta_fast.ops.low_rank.knots import Aligned, aligned
from peta_fast.ops.low_rank.sketch import DenseTiles, Refactored, Tiles, refactored

__all__ = [
    "Aligned",
    "DenseTiles",
    "LowRank",
    "Refactored",
    "Tiles",
    "Truncated",
    "aligned",
    "distance",
    "linear_peft",
    "norm_of",
    "refactored",
    "shares",
    "spectrum",
    "stacked",
    "truncated",
]
