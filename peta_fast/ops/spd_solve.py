"""Symmetric positive semi-definite systems: a Cholesky solve that says what it did, and conjugate gradients.

    direct     X A = B       A [n, n], X and B [m, n]
    iterative  A(X) = B      A any symmetric positive semi-definite map of a tensor's space

Both begin from a value X0 and leave alone what the system does not determine: X0's part in the null space stays.

Cholesky, in fp64, with A scaled to a unit diagonal. Rows of zeros (inputs that are never seen) are left out and keep
X0. A pivot below 1e-6 is taken for noise, since a Gram matrix of fp32 holds no more: then a ridge r is added to the
scaled diagonal, pulling towards X0 - (A + r D) X = B + r D X0 - with r = 1e-5, then 1e-4, ... up to 1e-2.

Cost: n^3 / 3 + 2 m n^2 flops; one application of A and 5 passes over X an iteration.
Source: Hestenes and Stiefel, 1952.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

SMALLEST_PIVOT = 1e-6
SMALLEST_RIDGE = 1e-5
LARGEST_RIDGE = 1e-2
REFRESH = 50
"""Iterations after which the residual is computed anew instead of carried on."""


@dataclass(frozen=True)
class Solved:
    """A solution and how it was found.

    value       X
    residuals   Frobenius norms |B - A(X)|: before the first iteration, and after each
    norm        |B|
    converged   whether the last residual is at most tolerance |B|; of a direct solve, True
    ridge       added to the scaled diagonal, 0 where none was needed
    unseen      rows of zeros, whose part of X0 was kept
    """

    value: Tensor
    residuals: tuple[float, ...] = field(default=())
    norm: float = 0.0
    converged: bool = True
    ridge: float = 0.0
    unseen: int = 0

    @property
    def iterations(self) -> int:
        return max(len(self.residuals) - 1, 0)

    def notes(self) -> dict[str, Any]:
        """What a report says of it; residuals relative to |B|."""
        if not self.residuals:
            return {"solver": "cholesky", "ridge": self.ridge, "unseen": self.unseen}
        relative = [r / self.norm if self.norm else 0.0 for r in self.residuals]
        return {
            "solver": "conjugate gradients",
            "converged": self.converged,
            "iterations": self.iterations,
            "residuals": relative,
            "norm": self.norm,
        }


def cholesky_solve(gram: Tensor, right: Tensor, start: Tensor) -> Solved:
    """X with X gram = right.

    gram   [n, n]  symmetric positive semi-definite, any floating dtype; lower precision than fp64 is widened
    right  [m, n]
    start  [m, n]  X0

    Returns X [m, n] in fp64. Raises ValueError when gram is not positive semi-definite, whatever the ridge.
    """
    gram, right, start = gram.double(), right.double(), start.double()
    diagonal = gram.diagonal()
    seen = (diagonal > 0).nonzero().flatten()
    unseen = gram.shape[0] - len(seen)
    if not len(seen):
        return Solved(start.clone(), unseen=unseen)
    if unseen:
        solved = cholesky_solve(gram[seen][:, seen], right[:, seen], start[:, seen])
        value = start.clone()
        value[:, seen] = solved.value
        return Solved(value, ridge=solved.ridge, unseen=unseen)
    scale = diagonal.rsqrt()
    factor, ridge = _factor(gram * scale * scale[:, None])
    # (X - X0) D^1/2 (S + r I) = (B - X0 A) D^-1/2, with S = D^-1/2 A D^-1/2
    step = torch.cholesky_solve(((right - start @ gram) * scale).T, factor).T * scale
    return Solved(start + step, ridge=ridge)


def _factor(scaled: Tensor) -> tuple[Tensor, float]:
    """Lower factor of `scaled`, which has a unit diagonal, and the ridge that it took."""
    ridge = 0.0
    while ridge <= LARGEST_RIDGE:
        shifted = scaled.clone()
        shifted.diagonal().add_(ridge)
        factor, failed = torch.linalg.cholesky_ex(shifted)
        if not failed and factor.diagonal().square().min() >= max(SMALLEST_PIVOT, 0.5 * ridge):
            return factor, ridge
        ridge = max(10 * ridge, SMALLEST_RIDGE)
    raise ValueError(f"expected a positive semi-definite matrix; it is not one with {LARGEST_RIDGE} on its diagonal")


def conjugate_gradients(
    apply: Callable[[Tensor], Tensor],
    right: Tensor,
    start: Tensor,
    *,
    precondition: Callable[[Tensor], Tensor] | None = None,
    tolerance: float = 1e-5,
    iterations: int = 100,
    absolute_first: float = 0.0,
) -> Solved:
    """X with A(X) = right, by preconditioned conjugate gradients.

    apply           A, symmetric positive semi-definite
    right, start    B and X0, of one shape and dtype; dot products are fp64 sums
    precondition    an approximation of A's inverse, symmetric positive definite. With it, residuals are smoothed: the
                    value is the point with the smallest residual on the line from the value before to the iterate
    tolerance       stops when |B - A(X)| <= tolerance |B|; the residual is then computed anew to be sure
    iterations      at most
    absolute_first  returns X0 at once when |B - A(X0)| is at most this

    The value has the last of the residuals. Source of the smoothing: Weiss, 1994.
    """
    norm = _norm(right)
    x, r = start.clone(), right - apply(start)
    residuals = [_norm(r)]
    goal = tolerance * norm
    if residuals[0] <= absolute_first or not norm:
        return Solved(x, tuple(residuals), norm, residuals[0] <= max(goal, absolute_first))
    smooth = _Smoothed(x, r) if precondition else None
    p, rz, carried, begun_at = None, 0.0, 0, residuals[0]
    while residuals[-1] > goal and len(residuals) <= iterations:
        z = precondition(r) if precondition else r
        before, rz = rz, _dot(r, z)
        p = z.clone() if p is None else p.mul_(rz / before).add_(z)
        ap = apply(p)
        curvature = _dot(p, ap)
        if not curvature > 0 or not rz > 0:  # rounding has taken the directions' conjugacy: begin again from here
            if not smooth or begun_at == residuals[-1]:
                break
            x, p, carried, begun_at = smooth.value.clone(), None, 0, residuals[-1]
            r = right - apply(x)
            continue
        step = rz / curvature
        x.add_(p, alpha=step)
        r.sub_(ap, alpha=step)
        carried += 1
        if carried == REFRESH or not smooth and _norm(r) <= goal:
            r, carried = right - apply(x), 0
        residuals.append(smooth.add(x, r) if smooth else _norm(r))
        if smooth and residuals[-1] <= goal:
            residuals[-1] = smooth.refresh(right - apply(smooth.value))
    return Solved(smooth.value if smooth else x, tuple(residuals), norm, residuals[-1] <= goal)


class _Smoothed:
    """The combination of the iterates so far whose residual is small: never larger than the one before."""

    def __init__(self, x: Tensor, r: Tensor):
        self.value, self.residual = x.clone(), r.clone()

    def add(self, x: Tensor, r: Tensor) -> float:
        """The residual's norm with one more iterate."""
        change = r - self.residual
        square = _dot(change, change)
        part = -_dot(self.residual, change) / square if square > 0 else 0.0
        self.value.lerp_(x, part)
        self.residual.add_(change, alpha=part)
        return _norm(self.residual)

    def refresh(self, residual: Tensor) -> float:
        self.residual = residual
        return _norm(residual)


def _dot(a: Tensor, b: Tensor) -> float:
    return torch.sum(a * b, dtype=torch.float64).item()


def _norm(a: Tensor) -> float:
    return torch.linalg.vector_norm(a, dtype=torch.float64).item()
