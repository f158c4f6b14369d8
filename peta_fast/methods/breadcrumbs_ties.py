"""Model Breadcrumbs with TIES' sign election: drop both the largest changes, as outliers, and the smallest, as noise.

    native          lo <= |delta| < hi, lo and hi the magnitudes at the two ends of the band
    mergekit        exactly int(density n) entries, equals lowest index first
    mergekit-0.1.4  as that release: a tensor with int(gamma n) = 0 keeps nothing

Source: Davari and Belilovsky, ECCV 2024.
"""

from __future__ import annotations

from dataclasses import dataclass

from peta_fast.methods import REQUIRED, MethodParams, TensorSpec, per_model, shared
from peta_fast.methods._dropping import breadcrumbs_terms
from peta_fast.methods._terms import elected
from peta_fast.ops.delta_merge import DeltaMerge

REFERENCE = "https://arxiv.org/abs/2312.06795"
COMPAT = ("native", "mergekit", "mergekit-0.1.4")


@dataclass(frozen=True)
class Params(MethodParams):
    weight: tuple[float, ...] = per_model(REQUIRED, help="multiplies each task vector")
    density: tuple[float, ...] = per_model(1.0, low=0.0, high=1.0, help="fraction of each task vector that is kept")
    gamma: float = shared(0.01, low=0.0, high=1.0, help="fraction of the largest magnitudes that is dropped")
    normalize: bool = shared(False, help="divide by the sum of the weights that agree")
    scaling: float = shared(1.0, alias="lambda", help="multiplies the merged task vector")


def lower(params: Params, tensor: TensorSpec) -> DeltaMerge:
    return elected(params, breadcrumbs_terms(params, tensor), tensor)
