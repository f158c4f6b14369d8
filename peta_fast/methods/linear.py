"""Weighted average of checkpoints: sum w x / sum w, in task order. No base.

    native    weights that sum to 0 are not divided by
    mergekit  weights that sum to 0 are refused: mergekit's own result is NaN

Source: Wortsman et al., ICML 2022 (model soups).
"""

from __future__ import annotations

from dataclasses import dataclass

from peta_fast.methods import REQUIRED, MethodParams, TensorSpec, per_model, shared
from peta_fast.methods._terms import terms, total_weight, weights_cancel
from peta_fast.ops.delta_merge import All, DeltaMerge

REFERENCE = "https://arxiv.org/abs/2203.05482"
COMPAT = ("native", "mergekit")
NEEDS_BASE = False


@dataclass(frozen=True)
class Params(MethodParams):
    weight: tuple[float, ...] = per_model(REQUIRED, help="share of each model")
    normalize: bool = shared(True, help="divide by the sum of the weights")


def check(params: Params, compat: str) -> list[str]:
    if compat == "mergekit" and params.normalize and weights_cancel(params.weight):
        return [f"weight: the sum of {params.weight} is 0, by which normalize divides; set normalize: false"]
    return []


def lower(params: Params, tensor: TensorSpec) -> DeltaMerge:
    parts = terms(params.weight, [All()] * tensor.models)
    return DeltaMerge(parts, base="zero", divide=total_weight(params.weight) if params.normalize else 1.0)
