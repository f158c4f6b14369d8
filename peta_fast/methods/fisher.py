"""Fisher merging: the mean of the models, element by element, weighted by how much each task's loss feels the element.

    theta = sum_t w_t F_t theta_t / sum_t w_t F_t        F_t: mean of the squared gradient over examples

Tensors without a Fisher are averaged; so are elements that no task feels at all (every F_t zero).

    native        as above, in fp64, so that one factor common to all F_t changes nothing
    mats          every F_t at least 1e-8
    fusion_bench  F_t + 1e-6, and w_t divided by the norm of the model's whole Fisher

Source: Matena and Raffel, NeurIPS 2022, arXiv:2111.09832.
"""

from __future__ import annotations

from dataclasses import dataclass

from peta_fast.errors import CheckpointError
from peta_fast.methods import REQUIRED, MethodParams, TensorSpec, per_model, shared
from peta_fast.methods._solving import average, check_weights, sides

REFERENCE = "https://arxiv.org/abs/2111.09832"
COMPAT = ("native", "mats", "fusion_bench")
NEEDS_BASE = "optional"

MATS_FLOOR = 1e-8
FUSION_BENCH_FLOOR = 1e-6


@dataclass(frozen=True)
class Params(MethodParams):
    statistics: tuple[str, ...] = per_model(REQUIRED, kind=str, help="file with the model's diagonal Fisher")
    check_statistics: bool = shared(True, help="whether they were collected from the model's own weights")
    weight: tuple[float, ...] = per_model(1.0, low=0.0, help="multiplies each Fisher")


def check(params: Params, compat: str) -> list[str]:
    return check_weights(params.weight)


def needs(params: Params) -> tuple[tuple[str, ...], ...]:
    return (("fisher",),)


def memory(params: Params, shape: tuple[int, ...], models: int) -> int:
    out, width = sides(shape)
    return 8 * 5 * out * width


def merge(base, models, params: Params, tensor: TensorSpec):
    for file, statistics in zip(params.statistics, tensor.statistics, strict=True):
        _refuse_negative(file, tensor.name, statistics.fisher)
    weights = [w * _factor(s, tensor) for w, s in zip(params.weight, tensor.statistics, strict=True)]
    return weighted(models, [s.fisher for s in tensor.statistics], weights, params.weight, tensor.compat)


def _refuse_negative(file: str, name: str, fisher) -> None:
    """Raises CheckpointError for what is no mean of squares."""
    wrong = int((fisher < 0).sum())
    if wrong:
        raise CheckpointError(
            file, f"'{name}.fisher': expected means of squares, got {wrong} negative values",
            "Collect them with peta_fast.collect_statistics.",
        )  # fmt: skip


def _factor(statistics, tensor: TensorSpec) -> float:
    if tensor.compat != "fusion_bench":
        return 1.0
    if not statistics.fisher_norm > 0:
        problem = "compat fusion_bench needs 'fisher_norm' in the metadata of the statistics, found none"
        raise CheckpointError(tensor.name, problem, "Collect them with peta_fast.collect_statistics.")
    return 1.0 / (statistics.fisher_norm + FUSION_BENCH_FLOOR)


def weighted(models, fishers, weights, fallback, compat: str = "native"):
    """sum w F theta / sum w F in fp64, the average by `fallback` where the divisor is 0."""
    import torch

    above = below = 0.0
    for model, fisher, weight in zip(models, fishers, weights, strict=True):
        importance = fisher.double()
        if compat == "mats":
            importance = importance.clamp_min(MATS_FLOOR)
        elif compat == "fusion_bench":
            importance = importance + FUSION_BENCH_FLOOR
        above, below = above + weight * importance * model.double(), below + weight * importance
    return torch.where(below > 0, above / below, average(models, fallback))
