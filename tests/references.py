"""What every merge method must return: fp64 values, given the decisions that fp32 takes.

    d_t  = fp32(x_t) - fp32(base), rounded to fp32
    e_t  = d_t * mask_t * a_t            trimmed, dropped or masked, then rescaled
    out  = base + scaling * sum_t(w_t e_t) / divisor

What decides (ranks, thresholds, keep probabilities, elected signs, divisors of exactly 0) is taken in `decisions`,
fp32 unless told otherwise: products rounded one by one, sums left to right in task order. What is a value is fp64.
Plain PyTorch on whole state dicts, because the TIES authors elect over the whole model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from philox_reference import keep_mask
from torch import Tensor
from trimming_reference import (
    band_by_count,
    band_by_threshold,
    della_probabilities,
    largest_by_authors,
    largest_by_count,
    largest_by_threshold,
)

VALUES = torch.float64
RUNNING_STATISTICS = ("running_mean", "running_var")
EXACT_COUNT = ("mergekit", "mergekit-0.1.4", "peft")


class Merged(NamedTuple):
    """One output tensor: value [*S] in fp64, and terms [*S], the summed magnitudes of all that was added up."""

    value: Tensor
    terms: Tensor


class TaskVectors(NamedTuple):
    """Sparsified task vectors e_t of one tensor, [T, *S]: as they decide (fp32) and as they add up (fp64)."""

    decided: Tensor
    exact: Tensor


@dataclass(frozen=True)
class Problem:
    """A merge of the floating tensors of a model; `tensors` are the names to be merged, in the order of the dict."""

    base: dict[str, Tensor] | None
    models: Sequence[dict[str, Tensor]]
    tensors: tuple[str, ...]
    compat: str = "native"
    seed: int = 0
    trim_scope: str = "tensor"
    decisions: torch.dtype = torch.float32
    parameters: dict[str, Any] = field(default_factory=dict)

    def shared(self, key: str, default: Any) -> Any:
        return self.parameters.get(key, default)

    def each(self, key: str, default: float) -> list[float]:
        """A parameter that each model may have for itself, as one number a model."""
        value = self.shared(key, default)
        return [float(v) for v in value] if isinstance(value, (list, tuple)) else [float(value)] * len(self.models)

    def deltas(self, task: int) -> dict[str, Tensor]:
        """The task vector of one model, in the dtype of decisions."""
        model = self.models[task]
        return {n: model[n].to(self.decisions) - self.base[n].to(self.decisions) for n in self.tensors}


def merge_reference(base, models, *, method, compat="native", seed=0, trim_scope="tensor", **parameters):
    """The merged state dict in fp64; integer and bool tensors are the base's own.

    base, models   dicts name -> floating or integer tensor; base is None for linear, slerp and passthrough
    parameters     recipe keys, a number or a list with one number a model; `decisions`, the dtype that decides
    Raises ValueError when the method does not implement `compat` or refuses a parameter.
    """
    merged = merge_with_terms(
        base, models, method=method, compat=compat, seed=seed, trim_scope=trim_scope, **parameters
    )
    return {name: m.value for name, m in merged.items()}


def merge_with_terms(
    base, models, *, method, compat="native", seed=0, trim_scope="tensor", decisions=torch.float32, **parameters
) -> dict[str, Merged]:
    """merge_reference, with the magnitude of the terms of every sum beside it."""
    merge, compats = METHODS[method]
    if compat not in compats:
        raise ValueError(f"{method}: expected compat among {compats}, got {compat!r}")
    first = base if base is not None else models[0]
    floating = [n for n in first if first[n].is_floating_point()]
    averaged = [n for n in floating if base is not None and n.rpartition(".")[2] in RUNNING_STATISTICS]
    tensors = tuple(n for n in floating if n not in averaged)
    merged = merge(Problem(base, models, tensors, compat, seed, trim_scope, decisions, parameters))
    merged |= {n: total([m[n].to(VALUES) / len(models) for m in models]) for n in averaged}
    merged |= {n: Merged(first[n], first[n]) for n in first if n not in floating}
    return {n: merged[n] for n in first}


def assert_close_to_reference(actual: Tensor, exact: Merged, num_tasks: int) -> None:
    """Half a unit in the last place of the output, and half an fp32 eps of the terms for each rounding before it.

    Those are T + 5: delta, mask, rescale, weight, T - 1 sums, divisor, scaling (the base is a term itself).
    """
    assert actual.shape == exact.value.shape, f"expected shape {tuple(exact.value.shape)}, got {tuple(actual.shape)}"
    info = torch.finfo(actual.dtype)
    exponent = torch.frexp(torch.maximum(actual.double().abs(), exact.value.abs())).exponent
    last_place = (info.eps * torch.exp2(exponent.double() - 1)).clamp(min=info.smallest_normal * info.eps)
    allowed = last_place / 2 + (num_tasks + 5) / 2 * torch.finfo(torch.float32).eps * exact.terms
    error = (actual.double() - exact.value).abs()
    wrong = ~(error <= allowed)
    assert not wrong.any(), (
        f"{int(wrong.sum())} of {wrong.numel()} elements differ; first at {wrong.nonzero()[0].tolist()}: "
        f"expected {exact.value[wrong][0].item()!r}, got {actual[wrong][0].item()!r}"
    )


# ---------------------------------------------------------------- methods


def linear(p: Problem) -> dict[str, Merged]:
    weights = p.each("weight", 1.0)
    divisor = sum_of_weights(weights) if p.shared("normalize", True) else 1.0
    return {
        n: total([w * m[n].to(VALUES) / divisor for w, m in zip(weights, p.models, strict=True)]) for n in p.tensors
    }


def passthrough(p: Problem) -> dict[str, Merged]:
    if len(p.models) != 1:
        raise ValueError(f"passthrough: expected 1 model, got {len(p.models)}")
    scale = p.each("scale", 1.0)[0]
    return {n: total([scale * p.models[0][n].to(VALUES)]) for n in p.tensors}


def slerp(p: Problem) -> dict[str, Merged]:
    if len(p.models) != 2:
        raise ValueError(f"slerp: expected 2 models, got {len(p.models)}")
    t = p.shared("t", 0.5)
    pairs = {n: [m[n].to(VALUES) for m in p.models] for n in p.tensors}
    coefficients = {n: slerp_coefficients(v0, v1, t, p.compat) for n, (v0, v1) in pairs.items()}
    return {n: total([c * v for c, v in zip(coefficients[n], pairs[n], strict=True)]) for n in p.tensors}


def slerp_coefficients(v0: Tensor, v1: Tensor, t: float, compat: str = "native") -> tuple[float, float]:
    """What to multiply v0 and v1 with; those of a straight line when the angle is too small, or undefined in native
    mode. An undefined angle is a right one in mergekit's.
    """
    norm0, norm1 = v0.norm().item(), v1.norm().item()
    if norm0 < 1e-8 or norm1 < 1e-8:
        right = math.pi / 2
        return (1 - t, t) if compat == "native" else (math.sin((1 - t) * right), math.sin(t * right))
    cosine = (v0 * v1).sum().item() / (norm0 * norm1)
    if abs(cosine) > 0.9995:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def task_arithmetic(p: Problem) -> dict[str, Merged]:
    return merge_each(p, keep_all, add_weighted_sum)


def masked_task_arithmetic(p: Problem) -> dict[str, Merged]:
    return merge_each(p, given_mask, add_weighted_sum)


def dare_linear(p: Problem) -> dict[str, Merged]:
    return merge_each(p, drop_at_random, add_weighted_sum)


def dare_ties(p: Problem) -> dict[str, Merged]:
    return merge_each(p, drop_at_random, add_elected_sum_by_count if p.compat == "peft" else add_elected_sum)


def magnitude_prune(p: Problem) -> dict[str, Merged]:
    return merge_each(p, keep_largest, add_weighted_sum)


def della_linear(p: Problem) -> dict[str, Merged]:
    return merge_each(p, drop_by_rank, add_weighted_sum)


def della(p: Problem) -> dict[str, Merged]:
    return merge_each(p, drop_by_rank, add_elected_sum, normalize=p.compat == "mergekit")


def breadcrumbs(p: Problem) -> dict[str, Merged]:
    return merge_each(p, keep_band, add_weighted_sum)


def breadcrumbs_ties(p: Problem) -> dict[str, Merged]:
    return merge_each(p, keep_band, add_elected_sum)


def ties(p: Problem) -> dict[str, Merged]:
    if p.compat in ("ties-authors", "peta"):
        return ties_over_the_model(p)
    combine = add_elected_sum_by_count if p.compat == "peft" else add_elected_sum
    return merge_each(p, keep_largest, combine, normalize=True)


def ties_over_the_model(p: Problem) -> dict[str, Merged]:
    """The authors' TIES: one threshold a task, and one majority sign for all columns that sum to 0."""
    if any(w != 1 for w in p.each("weight", 1.0)):
        raise ValueError(f"ties: {p.compat} knows no weights, got {p.shared('weight', 1.0)}")
    vectors = sparsify(p, keep_largest)
    signs = {n: in_task_order(vectors[n].decided).sign() for n in p.tensors}
    majority = np.sign(sum(int(s.sum()) for s in signs.values()))
    if majority == 0 and p.compat == "peta":
        majority = 1
    merged = {}
    for name, sign in signs.items():
        sign = torch.where(sign == 0, torch.full_like(sign, float(majority)), sign)
        agrees = torch.where(sign > 0, vectors[name].decided > 0, vectors[name].decided < 0)
        addends = agreeing_addends(vectors[name].exact * agrees, agrees, sign, p.shared("merge_func", "mean"))
        merged[name] = add_to_base(p, name, addends)
    return merged


def agreeing_addends(agreeing: Tensor, agrees: Tensor, sign: Tensor, merge_func: str) -> Tensor:
    """[T, *S] whose sum over the tasks is the mean, the sum, or the largest of the agreeing entries."""
    if merge_func == "max":
        return (sign * agreeing.abs().amax(0)).to(VALUES)[None]
    return agreeing / agrees.sum(0).clamp(min=1) if merge_func == "mean" else agreeing


# ---------------------------------------------------------------- sparsify: per task and tensor a mask and a factor a


def keep_all(p: Problem, task: int) -> Iterator[tuple[Tensor, Any]]:
    for d in p.deltas(task).values():
        yield torch.ones_like(d, dtype=torch.bool), 1.0


def given_mask(p: Problem, task: int) -> Iterator[tuple[Tensor, Any]]:
    """The mask called "<task>/<tensor>", else the one called "<tensor>"; a mask of mean 0 gives zeros."""
    masks = p.shared("mask", {})
    for name in p.tensors:
        mask = masks[f"{task}/{name}"] if f"{task}/{name}" in masks else masks[name]
        mean = mask.to(VALUES).mean().item() if mask.numel() else 0.0
        yield mask, 1 / mean if p.shared("mask_rescale", "none") == "mean" and mean != 0 else 1.0


def keep_largest(p: Problem, task: int) -> Iterator[tuple[Tensor, Any]]:
    density = p.each("density", 1.0)[task]
    if p.compat in ("ties-authors", "peta"):
        rule = largest_by_authors
    elif p.compat in EXACT_COUNT:
        rule = largest_by_count
    else:
        rule = largest_by_threshold
    return in_scope(p, task, lambda magnitudes: rule(magnitudes, density, p.compat))


def keep_band(p: Problem, task: int) -> Iterator[tuple[Tensor, Any]]:
    density, gamma = p.each("density", 1.0)[task], p.each("gamma", 0.01)[task]
    rule = band_by_threshold if p.compat == "native" else band_by_count
    return in_scope(p, task, lambda magnitudes: rule(magnitudes, density, gamma, p.compat))


def drop_at_random(p: Problem, task: int) -> Iterator[tuple[Tensor, Any]]:
    density = p.each("density", 1.0)[task]
    for name, d in p.deltas(task).items():
        kept = keep_mask(p.seed, task, name, torch.full(d.shape, density, dtype=VALUES))
        yield kept, rescale(p, d, kept, density)


def drop_by_rank(p: Problem, task: int) -> Iterator[tuple[Tensor, Any]]:
    density, epsilon = p.each("density", 1.0)[task], p.each("epsilon", 0.15)[task]
    for name, d in p.deltas(task).items():
        probability = della_probabilities(d, density, epsilon)
        kept = keep_mask(p.seed, task, name, probability)
        yield kept, rescale(p, d, kept, probability.float().to(VALUES))


def rescale(p: Problem, delta: Tensor, kept: Tensor, probability: float | Tensor) -> float | Tensor:
    """1/p as the papers have it, or, for mergekit, what restores the L1 norm."""
    if not p.shared("rescale", True):
        return 1.0
    if p.compat != "mergekit":
        probability = torch.as_tensor(probability, dtype=VALUES)
        return torch.where((probability <= 0) | (probability >= 1), 1.0, 1 / probability)
    before, after = delta.to(VALUES).abs().sum().item(), (delta.to(VALUES) * kept).abs().sum().item()
    return 1.0 if before < 1e-7 or after < 1e-7 else before / after


def in_scope(p: Problem, task: int, rule: Callable[[Tensor], Tensor]) -> Iterator[tuple[Tensor, Any]]:
    """Applies rule: |d| [n] -> kept [n] to each tensor, each index of dim 0 of a stacked tensor, or the whole model."""
    deltas = list(p.deltas(task).values())
    if p.trim_scope == "model" or p.compat in ("ties-authors", "peta"):
        together = torch.cat([d.abs().flatten() for d in deltas])
        parts = rule(together).split([d.numel() for d in deltas])
        yield from ((kept.reshape(d.shape), 1.0) for kept, d in zip(parts, deltas, strict=True))
        return
    for d in deltas:
        blocks = list(d) if p.trim_scope == "row-block" and d.ndim >= 3 else [d]
        kept = [rule(block.abs().flatten()) for block in blocks]
        yield torch.cat([*kept, torch.zeros(0, dtype=torch.bool)]).reshape(d.shape), 1.0


# ---------------------------------------------------------------- combine: the task vectors of a tensor into its merge


def merge_each(p: Problem, rule, combine, normalize: bool = False) -> dict[str, Merged]:
    normalize = p.shared("normalize", normalize)
    return {name: combine(p, name, vectors, normalize) for name, vectors in sparsify(p, rule).items()}


def sparsify(p: Problem, rule) -> dict[str, TaskVectors]:
    tasks = [dict(zip(p.tensors, rule(p, task), strict=True)) for task in range(len(p.models))]
    deltas = [p.deltas(task) for task in range(len(p.models))]
    return {
        n: TaskVectors(
            torch.stack([scaled(d[n], *task[n], p.decisions) for d, task in zip(deltas, tasks, strict=True)]),
            torch.stack([scaled(d[n], *task[n], VALUES) for d, task in zip(deltas, tasks, strict=True)]),
        )
        for n in p.tensors
    }


def scaled(delta: Tensor, mask: Tensor, factor: float | Tensor, dtype: torch.dtype) -> Tensor:
    return delta.to(dtype) * mask.to(dtype) * torch.as_tensor(factor, dtype=VALUES).to(dtype)


def add_weighted_sum(p: Problem, name: str, vectors: TaskVectors, normalize: bool) -> Merged:
    weights = p.each("weight", 1.0)
    divisor = sum_of_weights(weights) if normalize else 1.0
    return add_to_base(p, name, column(weights, vectors.exact) * vectors.exact / divisor)


def add_elected_sum(p: Problem, name: str, vectors: TaskVectors, normalize: bool) -> Merged:
    """Sign of the weighted sum; where that is 0, native keeps the base and mergekit elects plus."""
    weights = column(p.each("weight", 1.0), vectors.decided)
    weighted = weights * vectors.decided
    sign = in_task_order(weighted).sign()
    if p.compat != "native":
        sign = torch.where(sign == 0, 1.0, sign)
    agrees = (weighted.sign() == sign) & (sign != 0)
    divisor = in_task_order(agrees * weights) if normalize else torch.ones_like(sign)
    divisor = torch.where(divisor == 0, 1.0, divisor.to(VALUES))
    addends = column(p.each("weight", 1.0), vectors.exact) * vectors.exact * agrees / divisor
    return add_to_base(p, name, addends)


def add_elected_sum_by_count(p: Problem, name: str, vectors: TaskVectors, normalize: bool) -> Merged:
    """PEFT: sign of the sum before the weights, zero is plus; divided by how many agree."""
    sign = in_task_order(vectors.decided).sign()
    agrees = vectors.decided.sign() == torch.where(sign == 0, 1.0, sign)
    weighted = column(p.each("weight", 1.0), vectors.exact) * vectors.exact
    return add_to_base(p, name, weighted * agrees / agrees.sum(0).clamp(min=1))


def add_to_base(p: Problem, name: str, addends: Tensor) -> Merged:
    """base + scaling * sum of the addends [T, *S]; where that sum is 0, base with the sign of its zeros."""
    scaling, base = p.shared("scaling", 1.0), p.base[name].to(VALUES)
    merged = scaling * addends.sum(0)
    return Merged(torch.where(merged == 0, base, base + merged), base.abs() + abs(scaling) * addends.abs().sum(0))


def total(addends: Sequence[Tensor]) -> Merged:
    stacked = torch.stack(list(addends))
    return Merged(stacked.sum(0), stacked.abs().sum(0))


def in_task_order(stacked: Tensor) -> Tensor:
    """[T, *S] -> [*S], added one task after another in the tensor's own dtype."""
    result = torch.zeros_like(stacked[0])
    for t in stacked:
        result = result + t
    return result


def column(weights: Sequence[float], stacked: Tensor) -> Tensor:
    """[T] -> [T, 1, ..., 1] for [T, *S]."""
    return torch.tensor(weights, dtype=VALUES).to(stacked.dtype).reshape(-1, *[1] * (stacked.ndim - 1))


def sum_of_weights(weights: Sequence[float]) -> float:
    divisor = sum(weights)
    return 1.0 if abs(divisor) < 1e-8 else divisor


BOTH = ("native", "mergekit")
METHODS = {
    "linear": (linear, BOTH),
    "passthrough": (passthrough, BOTH),
    "slerp": (slerp, BOTH),
    "task_arithmetic": (task_arithmetic, BOTH),
    "ties": (ties, (*BOTH, "ties-authors", "peta", "peft")),
    "dare_linear": (dare_linear, (*BOTH, "peft")),
    "dare_ties": (dare_ties, (*BOTH, "peft")),
    "magnitude_prune": (magnitude_prune, ("native", "peft")),
    "della": (della, BOTH),
    "della_linear": (della_linear, BOTH),
    "breadcrumbs": (breadcrumbs, (*BOTH, "mergekit-0.1.4")),
    "breadcrumbs_ties": (breadcrumbs_ties, (*BOTH, "mergekit-0.1.4")),
    "masked_task_arithmetic": (masked_task_arithmetic, ("native",)),
}
