"""KnOTS: changes of several tasks in one basis, where they are merged entry by entry.

    [D_1 | .. | D_T] = U S [V_1^T | .. | V_T^T]      rep_t = S V_t^T [R, n];  merged change = U merge(rep_1 .. rep_T)
    Q R_B = [B_1 .. B_T],  P_t R_t = A_t^T               core = [R_B[:, 1] R_1^T | .. | R_B[:, T] R_T^T]   [R, R]

The SVD of the core is that of the stacked matrix [m, T n]: U = Q U_core, V_t = P_t V_core[t]. Cost 2 (m + n) R^2 flops,
R = sum r_t. Linear merges in this space are linear merges of the changes; TIES there is not TIES of the changes.
Source: Stoica et al., ICLR 2025, arXiv:2410.19735.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peta_fast.ops.low_rank.algebra import LowRank

SMALLEST = 1e-5
"""Singular values up to this are left out, as the authors' code does."""


@dataclass(frozen=True)
class Aligned:
    """D_t = U rep_t for every task: U [m, R] orthonormal, reps [R, n] each, fp64."""

    U: Tensor
    reps: tuple[Tensor, ...]

    def change(self, merged: Tensor) -> LowRank:
        """The merged change, of rank R."""
        return LowRank(self.U, merged.to(self.U.dtype))


def aligned(terms: Sequence[LowRank | None], smallest: float = SMALLEST) -> Aligned:
    """The tasks' changes in their common basis; None stands for a task that does not change this weight."""
    present = [t for t in terms if t is not None]
    Q, R_B = torch.linalg.qr(torch.cat([t.B.double() for t in present], 1))
    P, R_A = zip(*(torch.linalg.qr(t.A.double().T) for t in present), strict=True)
    blocks = R_B.split([t.rank for t in present], 1)
    core = torch.cat([block @ R.T for block, R in zip(blocks, R_A, strict=True)], 1)
    U, S, Vh = torch.linalg.svd(core, full_matrices=False)
    kept = max(1, int((smallest < S).sum()))
    scaled = (S[:kept, None] * Vh[:kept]).split([R.shape[0] for R in R_A], 1)
    reps = iter([part @ basis.T for part, basis in zip(scaled, P, strict=True)])
    nothing = torch.zeros(kept, present[0].shape[1], dtype=torch.float64)
    return Aligned(Q @ U[:, :kept], tuple(nothing if t is None else next(reps) for t in terms))
