"""Which entries of a task vector survive: one rule a method and compat mode, on the magnitudes of one scope.

largest_*   |d| [n] -> kept [n]: TIES
band_*      |d| [n] -> kept [n]: Breadcrumbs, the very largest dropped as well
della_probabilities   d [*S] -> keep probability [*S], by rank within each row
"""

from __future__ import annotations

import torch
from torch import Tensor


def largest_by_threshold(magnitudes: Tensor, density: float, compat: str) -> Tensor:
    """All that reach the k-th largest, k = max(1, int(density n)); density <= 0 keeps none, >= 1 all."""
    n = magnitudes.numel()
    if n == 0 or density <= 0 or density >= 1:
        return torch.full_like(magnitudes, density > 0, dtype=torch.bool)
    return magnitudes >= magnitudes.sort(descending=True).values[max(1, int(density * n)) - 1]


def largest_by_count(magnitudes: Tensor, density: float, compat: str) -> Tensor:
    """Exactly k, of equals the first; mergekit keeps at least one unless density <= 0, PEFT may keep none."""
    n = magnitudes.numel()
    k = int(density * n) if compat == "peft" or density <= 0 else max(1, int(density * n))
    return descending_rank(magnitudes) < k


def largest_by_authors(magnitudes: Tensor, density: float, compat: str) -> Tensor:
    """All that reach the k-th smallest, k = n - int(n density): one more than int(n density), and all ties."""
    if density >= 1 and compat == "ties-authors":
        raise ValueError(f"ties: ties-authors needs a density below 1, got {density}")
    n = magnitudes.numel()
    k = max(1, n - int(n * density))
    return magnitudes >= magnitudes.sort().values[k - 1] if n else magnitudes.bool()


def band_edges(n: int, density: float, gamma: float) -> tuple[int, int]:
    """How many of the largest are dropped, and how many of the next are kept."""
    target = min(n, int(density * n))
    return min(int(gamma * n), n - target), target


def band_by_threshold(magnitudes: Tensor, density: float, gamma: float, compat: str) -> Tensor:
    """(top + target)-th largest <= |d| < top-th largest; unbounded above when top = 0, empty when target = 0."""
    top, target = band_edges(magnitudes.numel(), density, gamma)
    if target <= 0:
        return torch.zeros_like(magnitudes, dtype=torch.bool)
    ordered = magnitudes.sort(descending=True).values
    below = magnitudes < ordered[top - 1] if top else torch.ones_like(magnitudes, dtype=torch.bool)
    return below & (magnitudes >= ordered[top + target - 1])


def band_by_count(magnitudes: Tensor, density: float, gamma: float, compat: str) -> Tensor:
    """Ranks [top, top + target), of equals the first; 0.1.4 keeps nothing when top = 0 and density < 1."""
    top, target = band_edges(magnitudes.numel(), density, gamma)
    if compat == "mergekit-0.1.4" and top == 0 and density < 1:
        target = 0
    rank = descending_rank(magnitudes)
    return (rank >= top) & (rank < top + target)


def della_probabilities(delta: Tensor, density: float, epsilon: float) -> Tensor:
    """[*S] fp64, from density - epsilon for the smallest of a row to density + epsilon for its largest."""
    if density >= 1 or density <= 0:
        return torch.full(delta.shape, float(density >= 1), dtype=torch.float64)
    if density - epsilon <= 0 or density + epsilon >= 1:
        raise ValueError(f"della: expected density ± epsilon inside (0, 1), got {density} ± {epsilon}")
    rows = delta.abs() if delta.ndim else delta.abs()[None]
    n = rows.shape[-1]
    if n <= 1:
        return torch.full(delta.shape, density, dtype=torch.float64)
    ascending = rows.argsort(dim=-1, stable=True).argsort(dim=-1)
    return ((density - epsilon) + 2 * epsilon * (ascending.to(torch.float64) / (n - 1))).reshape(delta.shape)


def descending_rank(magnitudes: Tensor) -> Tensor:
    """0 for the largest; of equals the lowest index comes first."""
    return magnitudes.argsort(descending=True, stable=True).argsort()
