"""Task vectors trimmed before they are fitted: the largest entries of each over the whole model, and of one sign."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peta_fast.errors import RecipeError
from peta_fast.fit._merged_model import MergedModel


@torch.no_grad()
def trim(merged: MergedModel, density: float, elect: bool = False) -> None:
    """Zeros all but the int(density N) largest magnitudes of each task vector, over the whole model, in place.

    Equals of the smallest that is kept are kept too. elect: of what is left, entries whose sign is not that of the sum
    over the tasks are zeroed as well.
    """
    if not 0 < density <= 1:
        raise RecipeError("density", f"expected a fraction above 0 and up to 1, got {density!r}")
    if density < 1:
        for task in range(merged.count):
            vectors = [piece.task_vectors[task] for piece in merged.pieces]
            threshold = kth_largest(vectors, max(1, int(density * sum(v.numel() for v in vectors))))
            for vector in vectors:
                vector[vector.abs() < threshold] = 0
    if elect:
        for piece in merged.pieces:
            total = sum(piece.task_vectors)
            for vector in piece.task_vectors:
                vector[vector * total.sign() <= 0] = 0


def kth_largest(vectors: Sequence[Tensor], k: int) -> Tensor:
    """The k-th largest magnitude over all vectors, exact: by its bits, 8 at a time, each time counting once more."""
    found, above = 0, 0
    for shift in (23, 15, 7, 0):
        width = 1 << (7 if shift == 0 else 8)
        counts = torch.zeros(width, dtype=torch.int64, device=vectors[0].device)
        for vector in vectors:
            bits = vector.flatten().view(torch.int32) & 0x7FFFFFFF
            prefix = shift + (7 if shift == 0 else 8)
            inside = bits[(bits >> prefix) == (found >> prefix)] if prefix < 31 else bits
            counts += torch.bincount((inside >> shift) & (width - 1), minlength=width)
        from_top = above + counts.flip(0).cumsum(0)
        place = int(torch.searchsorted(from_top, k))
        above = int(from_top[place - 1]) if place else above
        found |= (width - 1 - place) << shift
    return torch.tensor(found, dtype=torch.int32, device=vectors[0].device).view(torch.float32)
