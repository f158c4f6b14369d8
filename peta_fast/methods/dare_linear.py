"""DARE: drop entries of each task vector at random, rescale the rest, then sum.

    native    survivors divided by the density; peft: the same
    mergekit  survivors scaled so that the L1 norm of the tensor's task vector is restored

Source: Yu et al., ICML 2024.
"""

from __future__ import annotations

from dataclasses import dataclass

from peta_fast.methods import REQUIRED, MethodParams, TensorSpec, per_model, shared
from peta_fast.methods._dropping import dare_terms
from peta_fast.methods._terms import summed
from peta_fast.ops.delta_merge import DeltaMerge

REFERENCE = "https://arxiv.org/abs/2311.03099"
COMPAT = ("native", "mergekit", "peft")


@dataclass(frozen=True)
class Params(MethodParams):
    weight: tuple[float, ...] = per_model(REQUIRED, help="multiplies each task vector")
    density: tuple[float, ...] = per_model(1.0, low=0.0, high=1.0, help="probability that an entry survives")
    rescale: bool = shared(True, help="make up for what was dropped")
    normalize: bool = shared(False, help="divide by the sum of the weights")
    scaling: float = shared(1.0, alias="lambda", help="multiplies the merged task vector")


def lower(params: Params, tensor: TensorSpec) -> DeltaMerge:
    return summed(params, dare_terms(params, tensor), tensor)
