"""DELLA without sign election: drop entries at random, small magnitudes of a row more often than large ones.

    keep probability = density - epsilon + 2 epsilon (rank - 1) / (n - 1), rank of |delta| ascending within its row

    native    survivors divided by their own probability
    mergekit  survivors scaled so that the L1 norm of the tensor's task vector is restored

Source: Deep et al., 2024.
"""

from __future__ import annotations

from dataclasses import dataclass

from peta_fast.methods import REQUIRED, MethodParams, TensorSpec, per_model, shared
from peta_fast.methods._dropping import check_della, della_terms
from peta_fast.methods._terms import summed
from peta_fast.ops.delta_merge import DeltaMerge

REFERENCE = "https://arxiv.org/abs/2406.11617"
COMPAT = ("native", "mergekit")


@dataclass(frozen=True)
class Params(MethodParams):
    weight: tuple[float, ...] = per_model(REQUIRED, help="multiplies each task vector")
    density: tuple[float, ...] = per_model(1.0, low=0.0, high=1.0, help="mean probability that an entry survives")
    epsilon: float = shared(0.15, low=0.0, high=0.5, help="half the range of the probabilities")
    rescale: bool = shared(True, help="make up for what was dropped")
    normalize: bool = shared(False, help="divide by the sum of the weights")
    scaling: float = shared(1.0, alias="lambda", help="multiplies the merged task vector")


def check(params: Params, compat: str) -> list[str]:
    return check_della(params)


def lower(params: Params, tensor: TensorSpec) -> DeltaMerge:
    return summed(params, della_terms(params, tensor), tensor)
