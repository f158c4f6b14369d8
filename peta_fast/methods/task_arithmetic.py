"""base + scaling * sum w (model - base). A negative weight unlearns a task.

Source: Ilharco et al., ICLR 2023.
"""

from __future__ import annotations

from dataclasses import dataclass

from peta_fast.methods import REQUIRED, MethodParams, TensorSpec, per_model, shared
from peta_fast.methods._terms import summed, terms
from peta_fast.ops.delta_merge import All, DeltaMerge

REFERENCE = "https://arxiv.org/abs/2212.04089"
COMPAT = ("native", "mergekit")


@dataclass(frozen=True)
class Params(MethodParams):
    weight: tuple[float, ...] = per_model(REQUIRED, help="multiplies each task vector")
    normalize: bool = shared(False, help="divide by the sum of the weights")
    scaling: float = shared(1.0, alias="lambda", help="multiplies the merged task vector")


def lower(params: Params, tensor: TensorSpec) -> DeltaMerge:
    return summed(params, terms(params.weight, [All()] * tensor.models), tensor)
