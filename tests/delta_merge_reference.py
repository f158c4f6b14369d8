"""What the fused merge must return: fp64 values, given the decisions that fp32 takes.

    d_t = fp32(x_t) - fp32(base)      e_t = kept(d_t) · mask_t · prescale_t
    out = base + scaling · aggregate(w_t e_t over the tasks that agree with the elected sign) / divisor

In fp32, product by product and in task order: ranks, thresholds, keep probabilities, elected signs, the extreme and the
median task, and which divisors are 0 or below the floor. In fp64: every value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from philox_reference import uniforms

from peta_fast.ops.delta_merge import Above, All, Band, DeltaMerge, Nothing, Random, RankedRandom, Top

EPS = 2.0**-24
"""Half a unit in the last place of 1 in fp32: the most that one rounding moves it."""
LAST_PLACE = {"F32": (2.0**-23, 2.0**-149), "F16": (2.0**-10, 2.0**-24), "BF16": (2.0**-7, 2.0**-133)}
"""The distance of 1 to the next number, and of 0 to the next."""


class Merged(NamedTuple):
    """value [n] fp64; terms [n], what a relative error of one addend may amount to in the result."""

    value: np.ndarray
    terms: np.ndarray


@dataclass(frozen=True)
class Part:
    """One task's sparsified, masked and rescaled entries, as they decide and as they add up, and their weights."""

    decided: np.ndarray  # [n] fp32
    exact: np.ndarray  # [n] fp64
    weight: np.ndarray  # [n] fp32

    @property
    def weighted(self) -> np.ndarray:
        return self.decided * self.weight


def assert_close(actual: np.ndarray, exact: Merged, num_tasks: int, dtype: str) -> None:
    """Half a unit in the last place of the output, and one fp32 rounding of the terms for each step before it."""
    value = np.asarray(actual, np.float64)
    eps, smallest = LAST_PLACE[dtype]
    steps = 3 * num_tasks + 12
    allowed = eps / 2 * np.abs(exact.value) + smallest + steps * (EPS * exact.terms + 2.0**-149)
    wrong = np.flatnonzero(~(np.abs(value - exact.value) <= allowed))
    assert not len(wrong), (
        f"{len(wrong)} of {value.size} elements differ, first {wrong[0]}: "
        f"expected {exact.value[wrong[0]]!r} within {allowed[wrong[0]]:.3g}, got {value[wrong[0]]!r}"
    )


def delta_merge_reference(
    spec: DeltaMerge,
    base: np.ndarray,
    models: Sequence[np.ndarray],
    *,
    shape: Sequence[int],
    masks: Sequence[np.ndarray] = (),
    seed: int = 0,
    name: str = "w",
    majority: int = 0,
) -> Merged:
    """The merged tensor, flat. base, models and masks are fp32 [n]."""
    start = {"tensor": base, "zero": np.zeros_like(base), "one": np.ones_like(base)}[spec.base]
    parts = []
    for t, (term, x) in enumerate(zip(spec.terms, models, strict=True)):
        delta = x - start
        kept, probability = keep_entries(term.keep, delta, shape, spec.scope, uniforms(seed, t, name, delta.size))
        mask = masks[t] if spec.masked else np.ones_like(delta)
        factor = prescale_of(term.prescale, delta, kept, probability) * mask_factor(spec, mask)
        decided = np.where(kept, delta, np.float32(0)) * mask * factor.astype(np.float32)
        exact = np.where(kept, delta, 0).astype(np.float64) * mask * factor
        parts.append(Part(decided, exact, np.full(delta.size, term.weight, np.float32)))
    zero = {"drop": 0, "plus": 1, "minus": -1, "majority-minus": majority or -1, "majority-plus": majority or 1}
    added = combine(parts, elect=spec.elect, zero=zero[spec.zero], aggregate=spec.aggregate, divide=spec.divide)
    scaling = float(np.float32(spec.scaling))
    return Merged(start + scaling * added.value, np.abs(start) + np.abs(scaling * added.terms))


# ---------------------------------------------------------------- sparsify and prescale


def keep_entries(keep, delta, shape, scope, u):
    """bool [n], and the probabilities [n] of a random rule."""
    always = np.ones(delta.size)
    if isinstance(keep, (Top, Band)):
        blocks = shape[0] if scope == "row-block" and len(shape) > 2 else 1
        magnitudes = np.abs(delta).reshape(blocks, -1)
        return np.concatenate([keep_by_rank(keep, m) for m in magnitudes]), always
    if isinstance(keep, Random):
        return u < np.float32(keep.probability), always * np.float32(keep.probability)
    if isinstance(keep, RankedRandom):
        rows = np.abs(delta).reshape(-1, shape[-1] if len(shape) > 1 else delta.size)
        p = np.concatenate([ranked_probabilities(keep, row) for row in rows])
        return u < p, p.astype(np.float64)
    if isinstance(keep, Above):
        return np.abs(delta) > np.float32(keep.threshold), always
    return np.full(delta.size, isinstance(keep, All) and not isinstance(keep, Nothing)), always


def keep_by_rank(keep: Top | Band, magnitudes: np.ndarray) -> np.ndarray:
    """Ranks by (magnitude descending, index ascending); "all" takes every entry as large as the last that belongs."""
    n, skip = magnitudes.size, keep.skip if isinstance(keep, Band) else 0
    order = np.argsort(-magnitudes, kind="stable")
    first, last = min(skip, n), min(skip + keep.count, n)
    kept = np.zeros(n, bool)
    if keep.ties == "first":
        kept[order[first:last]] = True
    elif first < last:
        below = np.inf if first == 0 else magnitudes[order[first - 1]]
        kept = (magnitudes >= magnitudes[order[last - 1]]) & (magnitudes < below)
    return kept


def ranked_probabilities(keep: RankedRandom, row: np.ndarray) -> np.ndarray:
    """fp32 [columns], from `low` for the smallest to `high` for the largest."""
    order = np.argsort(row, kind="stable")
    p = np.empty(row.size, np.float32)
    steps = np.arange(row.size) / (row.size - 1) if row.size > 1 else np.full(1, 0.5)
    p[order] = (keep.low + (keep.high - keep.low) * steps).astype(np.float32)
    return p


def prescale_of(prescale, delta, kept, probability) -> np.ndarray:
    """[n] fp64."""
    if prescale == "1/p":
        return 1 / probability
    if prescale == "l1":
        whole = np.abs(delta).sum(dtype=np.float64)
        rest = np.abs(delta[kept]).sum(dtype=np.float64)
        return np.full(delta.size, 1.0 if whole < 1e-7 or rest < 1e-7 else whole / rest)
    return np.full(delta.size, float(np.float32(prescale)))


def mask_factor(spec: DeltaMerge, mask: np.ndarray) -> float:
    """1 / mean(mask); a mask of mean 0 keeps nothing, whatever the factor."""
    if spec.mask_rescale != "mean" or not mask.size:
        return 1.0
    mean = mask.mean(dtype=np.float64)
    return 1 / mean if mean else 0.0


# ---------------------------------------------------------------- elect, aggregate, normalize


def combine(parts, *, elect=None, zero=0, aggregate="sum", divide=1.0, floor=0.0, sign=None) -> Merged:
    """What is added to the base, before scaling. sign [n] is a given sign, for elect "given"."""
    n = parts[0].decided.size if parts else 0
    values = np.array([p.exact * p.weight.astype(np.float64) for p in parts]).reshape(len(parts), n)
    agrees = np.ones(values.shape, bool)
    if elect is not None:
        elected = np.sign(sign) if elect == "given" else elected_sign(parts, elect, zero)
        votes = np.array([np.sign(p.weighted if elect == "weighted" else p.decided) for p in parts])
        agrees = (votes == elected) & (elected != 0)
    if aggregate == "sum":
        total, terms = (values * agrees).sum(axis=0), (np.abs(values) * agrees).sum(axis=0)
    else:
        total = single_value(parts, values, agrees, aggregate)
        terms = np.abs(total)
    divisor, condition = divisor_of(parts, agrees, divide, floor)
    return Merged(total / divisor, terms / np.abs(divisor) * condition)


def elected_sign(parts, elect: str, zero: int) -> np.ndarray:
    """[n] in {-1, 0, 1}: of the fp32 sum in task order, or `zero` where that is 0."""
    total = np.float32(0)
    for p in parts:
        vote = p.weighted if elect == "weighted" else p.decided
        total = total + (np.sign(vote) if elect == "count" else vote)
    sign = np.sign(total)
    return np.where(sign == 0, np.float32(zero), sign)


def single_value(parts, values, agrees, aggregate: str) -> np.ndarray:
    """The value of one task at each element: the largest of those that agree, the largest of all, the lower median."""
    weighted = np.array([p.weighted for p in parts])
    if aggregate == "max":
        magnitudes = np.where(agrees, np.abs(weighted), -1)
        chosen = magnitudes.argmax(axis=0)
        return np.where(agrees.any(axis=0), np.take_along_axis(values, chosen[None], 0)[0], 0.0)
    if aggregate == "median":
        chosen = weighted.argsort(axis=0, kind="stable")[(len(parts) - 1) // 2]
    elif aggregate == "largest":
        chosen = np.abs(weighted).argmax(axis=0)
    else:
        chosen = len(parts) - 1 - np.abs(weighted)[::-1].argmax(axis=0)
    return np.take_along_axis(values, chosen[None], 0)[0]


def divisor_of(parts, agrees, divide, floor: float) -> tuple[np.ndarray | float, np.ndarray | float]:
    """The divisor, and by how much its own cancellation amplifies the roundings of its sum."""
    if not isinstance(divide, str):
        return float(np.float32(divide)), 1.0
    if divide == "agreeing-count":
        shares = agrees.astype(np.float32)
    else:
        shares = np.array([p.weight for p in parts]) * agrees
    decided = np.zeros(agrees.shape[1], np.float32)
    for share in shares:
        decided = decided + share
    exact = shares.sum(axis=0, dtype=np.float64)
    if floor > 0:
        low = decided < np.float32(floor)
        replaced = np.where(low, float(np.float32(floor)), exact)
    else:
        low = decided == 0
        replaced = np.where(low, 1.0, exact)
    return replaced, np.where(low, 1.0, np.abs(shares).sum(axis=0, dtype=np.float64) / np.abs(replaced))
