"""Task arithmetic within a mask: base + scaling * sum w m (model - base), m given by element, soft or binary.

The mask is one for all tasks (key `<tensor>`) or one a task (key `<task>/<tensor>`, tasks counted from 0): floats, bool
or uint8 of the tensor's shape, or uint8 with one bit an element. Values, not logits.

Source: Tang et al., 2023 (Concrete subspace learning); mask_rescale "mean" divides by the mask's mean, as there.
"""

from __future__ import annotations

from dataclasses import dataclass

from peta_fast.methods import REQUIRED, MethodParams, TensorSpec, per_model, shared
from peta_fast.methods._terms import terms
from peta_fast.ops.delta_merge import All, DeltaMerge

REFERENCE = "https://arxiv.org/abs/2312.06173"
COMPAT = ("native",)
MASKED = True


@dataclass(frozen=True)
class Params(MethodParams):
    mask: str = shared(REQUIRED, kind=str, help="file with the masks")
    weight: tuple[float, ...] = per_model(1.0, help="multiplies each task vector")
    mask_rescale: str = shared("none", choices=("none", "mean"), help="mean: divide by the mean of the mask")
    scaling: float = shared(1.0, alias="lambda", help="multiplies the merged task vector")


def lower(params: Params, tensor: TensorSpec) -> DeltaMerge:
    parts = terms(params.weight, [All()] * tensor.models)
    return DeltaMerge(parts, scaling=params.scaling, masked=True, mask_rescale=params.mask_rescale)
