"""Sums of low-rank changes and their best approximations of a given rank.

    D = sum_t B_t A_t = [B_1 .. B_T] [A_1; ..; A_T]                     the stacked factors, exact: rank R = sum r_t
    [B_1 .. B_T] = Q R_B,  [A_1; ..; A_T]^T = P R_A                     two thin QRs
    R_B R_A^T = U S V^T,  so D = (Q U) S (P V)^T                        an SVD of R x R

Cost: 2 (m + n) R^2 flops and an SVD of R x R, where a dense SVD takes O(m n min(m, n)); fp64 throughout.
Source: Golub and Van Loan, Matrix Computations, 4th ed., 5.2 and 2.4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """A change B A of a weight: B [m, r], A [r, n], of one floating dtype; every scaling is folded in."""

    B: Tensor
    A: Tensor

    def __post_init__(self) -> None:
        if self.B.dim() != 2 or self.A.dim() != 2 or self.B.shape[1] != self.A.shape[0]:
            raise ValueError(f"expected factors [m, r] and [r, n], got {list(self.B.shape)} and {list(self.A.shape)}")

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return self.B.shape[0], self.A.shape[1]

    def to(self, dtype: torch.dtype) -> LowRank:
        return LowRank(self.B.to(dtype), self.A.to(dtype))

    def dense(self) -> Tensor:
        """[m, n]; for tests and small matrices."""
        return self.B @ self.A


@dataclass(frozen=True)
class Spectrum:
    """D = (Q U) diag(S) (P V)^T with orthonormal columns, S descending, fp64.

    Q [m, R], U [R, k], S [k], V [R', k], P [n, R']
    """

    Q: Tensor
    U: Tensor
    S: Tensor
    V: Tensor
    P: Tensor

    @property
    def norm(self) -> float:
        """Frobenius norm of D."""
        return self.S.square().sum().sqrt().item()

    def left(self, rank: int) -> Tensor:
        return self.Q @ self.U[:, :rank]

    def right(self, rank: int) -> Tensor:
        return self.P @ self.V[:, :rank]


@dataclass(frozen=True)
class Truncated:
    """The best approximation of a rank, as it is stored.

    change  B A
    norm    Frobenius norm of what was approximated
    error   Frobenius norm of the difference, rounding of the stored factors included
    """

    change: LowRank
    norm: float
    error: float

    @property
    def energy(self) -> float:
        """Share of the squared norm that is kept; 1 of a change that is zero."""
        return 1.0 - (self.error / self.norm) ** 2 if self.norm else 1.0


def stacked(terms: Sequence[LowRank], weights: Sequence[float] | None = None) -> LowRank:
    """sum_t w_t B_t A_t exactly, the ranks side by side; the weights go into B, rounded once to fp32 (fp64 stays fp64).

    Raises ValueError where shapes differ.
    """
    if len({term.shape for term in terms}) != 1:
        raise ValueError(f"expected changes of one shape, got {[list(t.shape) for t in terms]}")
    dtype = torch.float32
    for term in terms:
        dtype = torch.promote_types(dtype, torch.promote_types(term.B.dtype, term.A.dtype))
    weights = [1.0] * len(terms) if weights is None else weights
    Bs = [(w * t.B.double()).to(dtype) if w != 1 else t.B.to(dtype) for t, w in zip(terms, weights, strict=True)]
    return LowRank(torch.cat(Bs, 1), torch.cat([t.A.to(dtype) for t in terms]))


def spectrum(change: LowRank) -> Spectrum:
    """The singular value decomposition of B A in factored form."""
    Q, R_B = torch.linalg.qr(change.B.double())
    P, R_A = torch.linalg.qr(change.A.double().T)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    return Spectrum(Q, U, S, Vh.T, P)


def truncated(change: LowRank, rank: int, dtype: torch.dtype = torch.float32) -> Truncated:
    """The best approximation of rank at most `rank`, stored in `dtype`, the singular values shared by both factors.

    Raises ValueError for a rank below 1.
    """
    if rank < 1:
        raise ValueError(f"expected a rank of at least 1, got {rank}")
    found = spectrum(change)
    kept = min(rank, found.S.numel())
    root = found.S[:kept].sqrt()
    B, A = found.left(kept) * root, (found.right(kept) * root).T
    stored = LowRank(B.to(dtype), A.to(dtype).contiguous())
    dropped = found.S[kept:].square().sum().item()
    rounding = _rounding(B, A, stored.B.double() - B, stored.A.double() - A)
    return Truncated(stored, found.norm, math.sqrt(dropped + rounding))


def _rounding(B: Tensor, A: Tensor, dB: Tensor, dA: Tensor) -> float:
    """|| (B + dB) (A + dA) - B A ||^2 out of Gram matrices of the factors: dB A + (B + dB) dA.

    What was dropped is orthogonal to dB A, and to B dA; its product with dB dA is of second order in the rounding.
    """
    left, right = torch.cat((dB, B + dB), 1), torch.cat((A, dA))
    return max(0.0, ((left.T @ left) * (right @ right.T)).sum().item())


def distance(a: LowRank, b: LowRank) -> float:
    """|| a - b || in the Frobenius norm, in fp64, without either matrix."""
    both = stacked([a.to(torch.float64), b.to(torch.float64)], [1.0, -1.0])
    R_B = torch.linalg.qr(both.B, mode="r").R
    R_A = torch.linalg.qr(both.A.T, mode="r").R
    return torch.linalg.matrix_norm(R_B @ R_A.T).item()


def norm_of(a: LowRank) -> float:
    """|| B A || in the Frobenius norm, in fp64."""
    return distance(a, LowRank(a.B[:, :1] * 0, a.A[:1] * 0))
