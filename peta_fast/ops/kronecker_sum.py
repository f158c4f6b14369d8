"""Sums of Kronecker products as maps of a matrix: A(W) = sum_t O_t W G_t, W [out, in].

G_t [in, in] and O_t [out, out] are symmetric positive semi-definite; O_t may be left out for the identity.

The preconditioner is a diagonal in the bases that diagonalize the two sums, P of sum_t G_t and Q of sum_t O_t:

    A'(X) = sum_t O'_t X G'_t,  G'_t = P^T G_t P,  O'_t = Q^T O_t Q,  W = Q X P^T
    M_ij  = sum_t (O'_t)_ii (G'_t)_jj + d max

It costs nothing in an iteration but a division, since the iteration runs in those bases, and P and Q are orthogonal, so
the residual's norm is that of the system as given. For one task, and for any number of commuting ones, M is exact but
for d. Grams of real layers span 1e7 and more, their products the square of it; d, the tolerance, keeps what is too
small to count in the residual from being amplified instead.

Cost of A: T (2 in^2 out + 2 in out^2) flops, as two products of stacked matrices. Of the bases: 9 (in^3 + out^3).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peta_fast.ops.spd_solve import Solved, conjugate_gradients

PRECONDITIONERS = ("eigen", "diagonal", "none")
ROTATED = 0.8
"""Of the tolerance, what the iteration in other bases takes; the rest is for rounding on the way back."""


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
        """P [in, in] and Q [out, out], found in fp64; Q is None without outputs."""
        if self.outputs is None:
            return _eigenvectors(self.inputs), None
        blocks = self.outputs.unflatten(1, (len(self.inputs), -1))
        return _eigenvectors(self.inputs.sum(0)), _eigenvectors(blocks.sum(1))

    def in_bases(self, p: Tensor, q: Tensor | None) -> KroneckerSum:
        """The same map of X, where W = Q X P^T."""
        found = object.__new__(KroneckerSum)
        found.inputs = p.T @ self.inputs @ p
        found.outputs = None
        if q is not None:
            blocks = self.outputs.unflatten(1, (len(self.inputs), -1)).movedim(1, 0)
            found.outputs = torch.cat(list(q.T @ blocks @ q), 1)
        return found


def _eigenvectors(matrix: Tensor) -> Tensor:
    return torch.linalg.eigh(matrix.double())[1].to(matrix.dtype)


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
    p, q = operator.eigenbases()
    rotated = operator.in_bases(p, q)

    def into(matrix: Tensor) -> Tensor:
        return matrix @ p if q is None else q.T @ (matrix @ p)

    def back(matrix: Tensor) -> Tensor:
        return matrix @ p.T if q is None else q @ (matrix @ p.T)

    # the step from the start, so that the start is kept bit for bit where nothing moves it
    inner = {**options, "tolerance": ROTATED * tolerance}
    solved = _with_diagonal(rotated, into(right), into(start), inner)
    value = start + back(solved.value - into(start))
    residuals = (*solved.residuals[:-1], torch.linalg.vector_norm(right - operator(value), dtype=torch.float64).item())
    return Solved(value, residuals, solved.norm, residuals[-1] <= max(tolerance * solved.norm, absolute_first))


def _with_diagonal(operator: KroneckerSum, right: Tensor, start: Tensor, options) -> Solved:
    diagonal = operator.diagonal()
    largest = diagonal.max().item()
    if not largest > 0:
        return conjugate_gradients(operator, right, start, **options)
    inverse = (diagonal.clamp_min(0) + max(options["tolerance"], torch.finfo(right.dtype).eps) * largest).reciprocal()
    return conjugate_gradients(operator, right, start, precondition=lambda r: r * inverse, **options)
