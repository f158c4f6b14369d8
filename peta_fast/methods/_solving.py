"""What the methods share that solve linear systems: weights as matrices, statistics as Gram matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from peta_fast.errors import CheckpointError
from peta_fast.methods import TensorSpec

EXACT_BELOW = 1 << 16
"""Elements up to which systems are solved in fp64 throughout; their products cost nothing."""


def check_weights(weight: Sequence[float]) -> list[str]:
    return [] if sum(weight) > 0 else [f"'weight' must be above 0 for one model at least, got {list(weight)}"]


def as_matrix(tensor, transposed: bool):
    """[out, in] of a layer's weight: convolutions with all that meets one output in a row; Conv1D turned round."""
    matrix = tensor.reshape(tensor.shape[0], -1) if tensor.dim() != 1 else tensor[None]
    return matrix.T if transposed else matrix


def as_stored(matrix, shape: tuple[int, ...], transposed: bool):
    """The reverse of as_matrix."""
    return (matrix.T if transposed else matrix).reshape(shape)


def average(tensors: Sequence[Any], weight: Sequence[float]):
    """Weighted mean in fp64."""
    total = sum(weight)
    return sum(t.double() * (w / total) for t, w in zip(tensors, weight, strict=True))


def sides(shape: Sequence[int]) -> tuple[int, int]:
    """(out, in) of the matrix that stands for a tensor; which of them is which does not matter to a sum over both."""
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))


def solve_directly(gram, right, start, tensor: TensorSpec):
    """X with X gram = right, as a Solved, and the tensor's notes of it. Raises CheckpointError, naming the tensor."""
    from peta_fast.ops.spd_solve import cholesky_solve

    try:
        solved = cholesky_solve(gram, right, start)
    except ValueError as error:
        raise CheckpointError(tensor.name, f"statistics: {error}", "Collect the statistics again.") from error
    tensor.notes.update(solved.notes())
    return solved
