"""The keep rules that DARE, DELLA and breadcrumbs each share between their plain and their electing form."""

from __future__ import annotations

from peta_fast.methods import TensorSpec
from peta_fast.methods._terms import terms, ties_rule
from peta_fast.ops.delta_merge import All, Band, Keep, Nothing, Random, RankedRandom


def dare_terms(params, tensor: TensorSpec):
    """Each entry survives with probability density; rescaled by 1 / density, or to the L1 norm as mergekit does."""
    keeps = [All() if d >= 1 else Nothing() if d <= 0 else Random(d) for d in params.density]
    return terms(params.weight, keeps, [_restored(params, tensor, k) for k in keeps])


def _restored(params, tensor: TensorSpec, keep: Keep) -> float | str:
    if not (params.rescale and isinstance(keep, Random)):
        return 1.0
    return "l1" if tensor.compat == "mergekit" else 1.0 / keep.probability


def check_della(params) -> list[str]:
    """The probabilities density +- epsilon must be probabilities."""
    return [
        f"density {d} and epsilon {params.epsilon}: density - epsilon and density + epsilon must lie within (0, 1)"
        for d in params.density
        if 0 < d < 1 and not (0 < d - params.epsilon and d + params.epsilon < 1)
    ]


def della_terms(params, tensor: TensorSpec):
    """Entries survive with a probability that rises with their rank in the row, density on the average."""
    keeps = [_ranked(d, params.epsilon) for d in params.density]
    restored = "1/p" if tensor.compat == "native" else "l1"
    return terms(params.weight, keeps, [restored if params.rescale and d < 1 else 1.0 for d in params.density])


def _ranked(density: float, epsilon: float) -> Keep:
    if density >= 1:
        return All()
    return RankedRandom(density - epsilon, density + epsilon) if density > 0 else Nothing()


def breadcrumbs_terms(params, tensor: TensorSpec):
    """Drops the int(gamma n) largest magnitudes and keeps the int(density n) after them."""
    return terms(params.weight, [_crumbs(d, params.gamma, tensor) for d in params.density])


def _crumbs(density: float, gamma: float, tensor: TensorSpec) -> Keep:
    n = tensor.trim_size
    target, top = int(density * n), int(gamma * n)
    if tensor.compat == "mergekit-0.1.4":
        return _crumbs_of_0_1_4(n, target, top)
    target = max(0, min(target, n))
    top = min(top, n - target)
    if not target:
        return Nothing()
    return Band(top, target, ties_rule(tensor))


def _crumbs_of_0_1_4(n: int, target: int, top: int) -> Keep:
    """mergekit up to 0.1.4 sliced [bottom:-top]: with nothing to drop at the top, nothing at all was kept."""
    if target >= n:
        return All()
    bottom = n - target - top
    if bottom < 0:
        top, bottom = top + bottom, 0
    return Band(top, n - bottom - top, "first") if top > 0 else Nothing()
