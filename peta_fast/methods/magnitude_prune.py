"""base + scaling * sum w trim(model - base): the largest changes of each task, added up.

    native    keep |delta| >= the k-th largest, k = max(1, int(density n))
    peft      exactly int(density n), equals lowest index first

Source: PEFT 0.21, merge_utils.magnitude_prune.
"""

from __future__ import annotations

from dataclasses import dataclass

from peta_fast.methods import REQUIRED, MethodParams, TensorSpec, per_model, shared
from peta_fast.methods._terms import summed, terms, trimmed
from peta_fast.ops.delta_merge import DeltaMerge

REFERENCE = "https://huggingface.co/docs/peft/developer_guides/model_merging"
COMPAT = ("native", "peft")


@dataclass(frozen=True)
class Params(MethodParams):
    weight: tuple[float, ...] = per_model(REQUIRED, help="multiplies each trimmed task vector")
    density: tuple[float, ...] = per_model(1.0, low=0.0, high=1.0, help="fraction of each task vector that is kept")
    normalize: bool = shared(False, help="divide by the sum of the weights")
    scaling: float = shared(1.0, alias="lambda", help="multiplies the merged task vector")


def lower(params: Params, tensor: TensorSpec) -> DeltaMerge:
    keeps = [trimmed(d, tensor, at_least_one=tensor.compat == "native") for d in params.density]
    return summed(params, terms(params.weight, keeps), tensor)
