"""Factors of a matrix that is looked at tile by tile: a randomized SVD with a measured error.

    X_0 = Omega [n, l],  X_j = orth(D^T D X_{j-1})          j = 1 .. q: one reading of D each, tile^T (tile X) added up
    Y = D X_q = U S W^T                                      one reading
    B = U sqrt(S), A = sqrt(S) (X_q W)^T, cut to rank k      l = k + OVERSAMPLING columns are drawn
    error = || D - B A ||                                    one reading: measured over all of D, rounding included

Cost: (q + 2) readings, 4 m n l flops each. By the power iterations the error is that of the best approximation up to a
factor that goes to 1 as (sigma_{l+1} / sigma_k)^(2 q).
Source: Halko, Martinsson and Tropp, SIAM Review 2011, algorithms 4.4 and 5.1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from peta_fast.ops.low_rank.algebra import LowRank

OVERSAMPLING = 16
ITERATIONS = 3


class Tiles(Protocol):
    """A matrix [m, n] in runs of rows. Every reading yields the same numbers, (first row, rows [*, n] fp32)."""

    shape: tuple[int, int]

    def __iter__(self) -> Iterator[tuple[int, Tensor]]: ...


@dataclass(frozen=True)
class DenseTiles:
    """A matrix that is there as a whole."""

    matrix: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.matrix.shape)

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        yield 0, self.matrix


@dataclass(frozen=True)
class Refactored:
    """change ~ D.

    norm   Frobenius norm of D
    error  Frobenius norm of D - B A, as measured
    """

    change: LowRank
    norm: float
    error: float

    @property
    def energy(self) -> float:
        """Share of the squared norm that is kept; 1 of a matrix that is zero."""
        return 1.0 - (self.error / self.norm) ** 2 if self.norm else 1.0


def refactored(
    tiles: Tiles,
    rank: int,
    *,
    seed: int = 0,
    iterations: int = ITERATIONS,
    dtype: torch.dtype = torch.float32,
    energy: float | None = None,
) -> Refactored:
    """B [m, k] and A [k, n] with B A ~ D, in `dtype`; k = rank, or the smallest side of D, or less by `energy`.

    seed    of Omega, drawn on the CPU: one seed, one result on one machine
    energy  keep the fewest ranks that hold this share of the squared norm, and at most `rank`
    Raises ValueError for a rank below 1, or when D is not finite.
    """
    if rank < 1:
        raise ValueError(f"expected a rank of at least 1, got {rank}")
    m, n = tiles.shape
    columns = min(rank + OVERSAMPLING, m, n)
    X = torch.randn(n, columns, generator=torch.Generator().manual_seed(seed))
    for _ in range(iterations if columns < n else 0):
        X = _orthonormal(_normal_times(tiles, X))
    X = _orthonormal(X)
    Y, squares = torch.empty(m, columns), 0.0
    for row, tile in tiles:
        torch.mm(tile, X, out=Y[row : row + len(tile)])
        squares += torch.linalg.vector_norm(tile).double().item() ** 2
    if not math.isfinite(squares):
        raise ValueError("expected finite values")
    U, S, Wh = torch.linalg.svd(Y.double(), full_matrices=False) if m < 4 * columns else _tall_svd(Y.double())
    kept = min(rank, S.numel())
    if energy is not None and squares:
        kept = min(kept, 1 + int((S.square().cumsum(0) < energy * squares).sum()))
    root = S[:kept].sqrt()
    B, A = (U[:, :kept] * root).to(dtype), (root[:, None] * (Wh[:kept] @ X.double().T)).to(dtype)
    return Refactored(LowRank(B, A), math.sqrt(squares), math.sqrt(_squared_error(tiles, B.float(), A.float())))


def _normal_times(tiles: Tiles, X: Tensor) -> Tensor:
    """D^T D X in one reading."""
    total = torch.zeros_like(X)
    for _, tile in tiles:
        total.addmm_(tile.T, tile @ X)
    return total


def _orthonormal(X: Tensor) -> Tensor:
    """Orthonormal columns of the same span, in fp32; computed in fp64."""
    return torch.linalg.qr(X.double()).Q.float()


def _tall_svd(Y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    Q, R = torch.linalg.qr(Y)
    U, S, Wh = torch.linalg.svd(R, full_matrices=False)
    return Q @ U, S, Wh


def _squared_error(tiles: Tiles, B: Tensor, A: Tensor) -> float:
    """|| D - B A ||^2 in one reading."""
    total = 0.0
    for row, tile in tiles:
        rest = torch.addmm(tile, B[row : row + len(tile)], A, alpha=-1)
        total += torch.linalg.vector_norm(rest).double().item() ** 2
    return total
