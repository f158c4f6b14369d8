"""What several methods share: terms from per-model weights, trimming rules by compat name, normalization."""

from __future__ import annotations

from collections.abc import Sequence

from peta_fast.methods import TensorSpec
from peta_fast.ops.delta_merge import All, DeltaMerge, Keep, Nothing, Term, Ties, Top


def kept_count(density: float, size: int, *, at_least_one: bool = True) -> int:
    """How many of `size` entries a density keeps: int(density n), at least one when it is above 0."""
    if density <= 0 or size == 0:
        return 0
    return min(size, max(1 if at_least_one else 0, int(density * size)))


def trimmed(density: float, tensor: TensorSpec, *, at_least_one: bool = True) -> Keep:
    """Keeps the largest magnitudes: with their equals in native semantics, an exact count in the others."""
    if density >= 1:
        return All()
    count = kept_count(density, tensor.trim_size, at_least_one=at_least_one)
    return Top(count, ties_rule(tensor)) if count else Nothing()


def ties_rule(tensor: TensorSpec) -> Ties:
    """Native thresholds keep all equals, and so does one over a whole model; the others count exactly."""
    return "all" if tensor.compat == "native" or tensor.scope == "model" else "first"


def terms(weights: Sequence[float], keeps: Sequence[Keep], prescale=1.0) -> tuple[Term, ...]:
    scales = prescale if isinstance(prescale, (list, tuple)) else [prescale] * len(weights)
    return tuple(Term(w, k, s) for w, k, s in zip(weights, keeps, scales, strict=True))


def total_weight(weights: Sequence[float]) -> float:
    """The divisor of an unelected weighted mean; 1 where the weights cancel."""
    return 1.0 if weights_cancel(weights) else sum(weights)


def weights_cancel(weights: Sequence[float]) -> bool:
    return abs(sum(weights)) < 1e-8


def summed(params, parts: tuple[Term, ...], tensor: TensorSpec) -> DeltaMerge:
    """scaling * sum w d, divided by the sum of the weights when normalize is set."""
    divide = total_weight(params.weight) if params.normalize else 1.0
    return DeltaMerge(parts, divide=divide, scaling=params.scaling, scope=tensor.scope)


def elected(params, parts: tuple[Term, ...], tensor: TensorSpec) -> DeltaMerge:
    """Only the entries that agree with the sign of the weighted sum; normalized by the weights of those.

    A zero sum leaves the base in native semantics and counts as plus in mergekit's.
    """
    return DeltaMerge(
        parts,
        elect="weighted",
        zero="drop" if tensor.compat == "native" else "plus",
        divide="agreeing-weight" if params.normalize else 1.0,
        scaling=params.scaling,
        scope=tensor.scope,
    )


def elected_by_peft(params, parts: tuple[Term, ...], tensor: TensorSpec) -> DeltaMerge:
    """The sign of the sum before the weights, zero as plus; divided by the number of those that agree."""
    return DeltaMerge(
        parts, elect="unweighted", zero="plus", divide="agreeing-count", scaling=params.scaling, scope=tensor.scope
    )
