"""RegMean: each layer's weight that comes nearest to all tasks' outputs on their own inputs, in closed form.

    W (sum_t w_t S(G_t)) = sum_t w_t W_t S(G_t),   G_t = mean of x x^T,   S(G) = a G + (1 - a) diag(G)

Tensors without a Gram matrix are averaged. Where the sum is singular - inputs never seen, fewer rows than columns -
what it does not determine stays at the average; how, peta_fast.ops.spd_solve says, and the report tells where.

    native  as above
    mats    inputs that no task has seen get the weight 0, and there is no ridge

Source: Jin et al., ICLR 2023, arXiv:2212.09849.
"""

from __future__ import annotations

from dataclasses import dataclass

from peta_fast.errors import CheckpointError
from peta_fast.methods import REQUIRED, MethodParams, TensorSpec, per_model, shared
from peta_fast.methods._solving import as_matrix, as_stored, average, check_weights, sides, solve_directly

REFERENCE = "https://arxiv.org/abs/2212.09849"
COMPAT = ("native", "mats")
NEEDS_BASE = "optional"


@dataclass(frozen=True)
class Params(MethodParams):
    statistics: tuple[str, ...] = per_model(REQUIRED, kind=str, help="file with the model's Gram matrices")
    check_statistics: bool = shared(True, help="whether they were collected from the model's own weights")
    weight: tuple[float, ...] = per_model(1.0, low=0.0, help="multiplies each Gram matrix")
    off_diagonal: float = shared(0.9, low=0.0, high=1.0, alias="alpha", help="a: multiplies off-diagonal elements")


def check(params: Params, compat: str) -> list[str]:
    return check_weights(params.weight)


def needs(params: Params) -> tuple[tuple[str, ...], ...]:
    return (("input_gram",),)


def memory(params: Params, shape: tuple[int, ...], models: int) -> int:
    out, width = sides(shape)
    return 8 * (6 * max(out, width) ** 2 + 5 * out * width)


def merge(base, models, params: Params, tensor: TensorSpec):
    from peta_fast.ops.gram import scale_off_diagonal, unpack

    transposed = tensor.statistics[0].transposed
    total = right = 0.0
    for model, weight, statistics in zip(models, params.weight, tensor.statistics, strict=True):
        gram = scale_off_diagonal(unpack(statistics.input_gram).double(), params.off_diagonal).mul_(weight)
        total, right = total + gram, right + as_matrix(model.double(), transposed) @ gram
    start = as_matrix(average(models, params.weight), transposed)
    if tensor.compat == "mats":
        start = start * (total.diagonal() > 0)
    solved = solve_directly(total, right, start, tensor)
    if tensor.compat == "mats" and solved.ridge:
        problem = "the sum of the Gram matrices is singular"
        raise CheckpointError(tensor.name, problem, "`compat: native` solves it with a ridge towards the average.")
    return as_stored(solved.value, tensor.shape, transposed)
