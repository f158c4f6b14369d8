"""RegMean++: RegMean with Gram matrices of what the merged layers before a layer let through.

The statistics come from `peta_fast.regmean_pp`, which merges block by block as it collects them; this method makes the
same merge of checkpoints in files, and refuses Grams of the models by themselves (that is regmean).

Source: Nguyen et al., 2025, arXiv:2508.03121.
"""

from __future__ import annotations

from peta_fast.errors import CheckpointError
from peta_fast.methods import TensorSpec, regmean
from peta_fast.methods.regmean import Params, check, memory, needs

__all__ = ["COMPAT", "NEEDS_BASE", "REFERENCE", "Params", "check", "memory", "merge", "needs"]

REFERENCE = "https://arxiv.org/abs/2508.03121"
COMPAT = ("native",)
NEEDS_BASE = "optional"


def collected_as(off_diagonal: float) -> str:
    """What the metadata of such statistics says."""
    return f"regmean_pp, off_diagonal {off_diagonal:g}"


def merge(base, models, params: Params, tensor: TensorSpec):
    wanted = collected_as(params.off_diagonal)
    for file, statistics in zip(params.statistics, tensor.statistics, strict=True):
        if statistics.collected != wanted:
            raise CheckpointError(
                file, f"expected Gram matrices collected by {wanted}, got {statistics.collected or 'those of regmean'}",
                "Collect them with peta_fast.regmean_pp and the same off_diagonal, or use method: regmean.",
            )  # fmt: skip
    return regmean.merge(base, models, params, tensor)
