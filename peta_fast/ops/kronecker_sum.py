"""Sums of Kronecker products as maps of a matrix: A(W) = sum_t O_t W G_t, W [out, in].

G_t [in, in] and O_t [out, out] are symmetric positive semi-definite; O_t may be left out for the identity.

The system is solved in the bases that diagonalize the two sums, P of sum_t G_t and Q of sum_t O_t, largest first, and
only in as many of their columns, k and l, as the residual has a part in that counts:

    W = W0 + Q_l X P_k^T        sum_t O'_t X G'_t = Q_l^T (B - A(W0)) P_k,  G'_t = P_k^T G_t P_k,  O'_t = Q_l^T O_t Q_l
    M_ij = sum_t (O'_t)_ii (G'_t)_jj + d max            the preconditioner of this smaller system

Spectra of real layers fall by 1e3 within a tenth of their width and by 1e7 over all of it, so the smaller system is
small, its iterations cost next to nothing, and directions that no task cares about, where a little noise would become
a long step, are left alone. The residual is then formed anew from all of A; where it is not yet what was asked for,
more columns follow, up to all. For one task, and for any number of commuting ones, M is exact but for d, the tolerance,
which keeps what is too small to count in the residual from being amplified.

Cost of A: T (2 in^2 out + 2 in out^2) flops, as two products of stacked matrices; it is applied twice, and once more
each time that columns follow. Of the bases: 9 (in^3 + out^3).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from peta_fast.ops.spd_solve import Solved, conjugate_gradients

PRECONDITIONERS = ("eigen", "diagonal", "none")
WITHIN = 0.8
"""Of the tolerance, what the iteration within the columns takes; the rest is for what lies outside, and rounding."""
LEFT_OUT = 0.5
"""Of the tolerance, the residual's part outside of the first columns; a quarter of that when more follow."""
COLUMNS = 32
"""Their number is a multiple of this: products of such sides are fast."""
ROUNDED = 1e-3
"""Below this tolerance the last residual is formed in fp64, whatever the operator's dtype."""


class KroneckerSum:
    """A(W) = sum_t O_t W G_t.

    inputs   T of [in, in]
    outputs  T of [out, out], or None: O_t = 1, and `weights` [T] in their place
    """

    def __init__(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor] | None, weights: Sequence[float] = ()):
        if outputs is None:
            self.inputs = sum(g * w for g, w in zip(inputs, weights or [1.0] * len(inputs), strict=True))
            self.outputs = None
        else:
            self.inputs = torch.stack(list(inputs))
            self.outputs = torch.cat(list(outputs), 1)  # [out, T out]

    def __call__(self, matrix: Tensor) -> Tensor:
        """[out, in] -> [out, in]"""
        product = torch.matmul(matrix, self.inputs)
        return product if self.outputs is None else self.outputs @ product.flatten(0, 1)

    def diagonal(self) -> Tensor:
        """[out, in], or [1, in] without outputs: A's own diagonal."""
        if self.outputs is None:
            return self.inputs.diagonal()[None]
        blocks = self.outputs.unflatten(1, (len(self.inputs), -1))
        return blocks.diagonal(dim1=0, dim2=2).T @ self.inputs.diagonal(dim1=1, dim2=2)

    def eigenbases(self) -> tuple[Tensor, Tensor | None]:
        """P [in, in] and Q [out, out], the largest eigenvalues first; Q is None without outputs."""
        if self.outputs is None:
            return _eigenvectors(self.inputs), None
        blocks = self.outputs.unflatten(1, (len(self.inputs), -1))
        return _eigenvectors(self.inputs.sum(0)), _eigenvectors(blocks.sum(1))

    def within(self, p: Tensor, q: Tensor | None) -> KroneckerSum:
        """X -> Q^T A(Q X P^T) P, for orthonormal columns p [in, k] and q [out, l]."""
        found = object.__new__(KroneckerSum)
        found.inputs = p.T @ self.inputs @ p
        found.outputs = None
        if q is not None:
            blocks = self.outputs.unflatten(1, (len(self.inputs), -1)).movedim(1, 0)
            found.outputs = torch.cat(list(q.T @ blocks @ q), 1)
        return found

    def wide(self, matrix: Tensor) -> Tensor:
        """A(W) in fp64, one task at a time."""
        matrix = matrix.double()
        if self.outputs is None:
            return matrix @ self.inputs.double()
        blocks = self.outputs.unflatten(1, (len(self.inputs), -1)).movedim(1, 0)
        return sum(o.double() @ (matrix @ g.double()) for o, g in zip(blocks, self.inputs, strict=True))


def _eigenvectors(matrix: Tensor) -> Tensor:
    return torch.linalg.eigh(matrix)[1].flip(1)


def solve_kronecker_sum(
    operator: KroneckerSum,
    right: Tensor,
    start: Tensor,
    *,
    preconditioner: str = "eigen",
    tolerance: float = 1e-5,
    iterations: int = 100,
    absolute_first: float = 0.0,
) -> Solved:
    """W with A(W) = right, by conjugate gradients from `start`; all [out, in] and of the operator's dtype.

    preconditioner  "eigen" as above, "diagonal": A's own diagonal, or "none"

    Raises ValueError for another preconditioner.
    """
    options = {"tolerance": tolerance, "iterations": iterations, "absolute_first": absolute_first}
    if preconditioner == "none":
        return conjugate_gradients(operator, right, start, **options)
    if preconditioner == "diagonal":
        return _with_diagonal(operator, right, start, options)
    if preconditioner != "eigen":
        raise ValueError(f"expected a preconditioner of {', '.join(PRECONDITIONERS)}, got {preconditioner!r}")
    return _in_columns(operator, right, start, **options)


def _in_columns(
    operator: KroneckerSum, right: Tensor, start: Tensor, tolerance: float, iterations: int, absolute_first: float
) -> Solved:
    """By steps within more and more columns of the bases; the start is kept bit for bit where nothing moves it."""
    norm, value, residual = _norm(right), start.clone(), right - operator(start)
    residuals, goal = [_norm(residual)], tolerance * norm
    if residuals[0] <= max(absolute_first, goal):
        return Solved(value, tuple(residuals), norm, True)
    p, q = operator.eigenbases()
    left_out, used = LEFT_OUT, (0, 0)
    while residuals[-1] > goal and len(residuals) <= iterations:
        inside = residual @ p if q is None else q.T @ (residual @ p)
        used = _columns(inside, left_out * goal, used, whole=q is None)
        inside, outside = _split(inside, *used)
        columns, rows = p[:, : used[1]], None if q is None else q[:, : used[0]]
        smaller = operator.within(columns, rows)
        precondition = _diagonal_of(smaller, tolerance)
        within = math.sqrt(max((WITHIN * goal) ** 2 - outside**2, (WITHIN * goal / 2) ** 2))
        solved = conjugate_gradients(
            smaller, inside, torch.zeros_like(inside), precondition=precondition,
            tolerance=within / (_norm(inside) or 1.0), iterations=iterations + 1 - len(residuals),
        )  # fmt: skip
        step = solved.value @ columns.T
        value += step if rows is None else rows @ step
        residual = right - operator(value)
        residuals += [math.hypot(r, outside) for r in solved.residuals[1:-1]] + [_norm(residual)]
        left_out /= 4
        if used == tuple(right.shape):
            break
    if tolerance < ROUNDED:
        residuals[-1] = _norm(right.double() - operator.wide(value))
    return Solved(value, tuple(residuals), norm, residuals[-1] <= goal)


def _columns(inside: Tensor, left_out: float, before: tuple[int, int], whole: bool) -> tuple[int, int]:
    """How many rows and columns of the residual in the bases hold all of it but `left_out`; more than before.

    whole  take all rows
    """
    squares = inside.double().square()
    found = []
    for side, (sums, had) in enumerate(zip((squares.sum(1), squares.sum(0)), before, strict=True)):
        after = sums.flip(0).cumsum(0).flip(0)  # of what begins with this one
        count = int((after > left_out**2 / 2).sum())
        count = max(-(-count // COLUMNS) * COLUMNS, 2 * had, COLUMNS)
        found.append(len(sums) if whole and not side else min(count, len(sums)))
    return found[0], found[1]


def _split(inside: Tensor, rows: int, columns: int) -> tuple[Tensor, float]:
    """The corner that is solved for, and the norm of the rest."""
    corner = inside[:rows, :columns].contiguous()
    squares = inside.double().square().sum() - corner.double().square().sum()
    return corner, math.sqrt(max(squares.item(), 0.0))


def _norm(matrix: Tensor) -> float:
    return torch.linalg.vector_norm(matrix, dtype=torch.float64).item()


def _with_diagonal(operator: KroneckerSum, right: Tensor, start: Tensor, options) -> Solved:
    precondition = _diagonal_of(operator, options["tolerance"])
    return conjugate_gradients(operator, right, start, precondition=precondition, **options)


def _diagonal_of(operator: KroneckerSum, tolerance: float) -> Callable[[Tensor], Tensor] | None:
    """Division by A's own diagonal, and d of its largest; None for an operator of zeros."""
    diagonal = operator.diagonal()
    largest = diagonal.max().item()
    if not largest > 0:
        return None
    inverse = (diagonal.clamp_min(0) + max(tolerance, torch.finfo(diagonal.dtype).eps) * largest).reciprocal()
    return lambda residual: residual * inverse
