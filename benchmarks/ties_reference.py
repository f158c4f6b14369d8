"""TIES three more times, to check and to compare with: exactly in fp64, and as careful plain PyTorch has it.

    d_t = fp32(x_t) - fp32(base);  keep the k largest |d_t|, k = max(1, int(density n));  sign of sum_t w_t d_t
    out = base + sum of w_t d_t that agree / sum of their w_t

What decides (ranks, signs) is taken in fp32, in task order, as every implementation here does; values are fp64. Equals
at the threshold: "first" keeps the lowest indices up to k, "all" keeps all. A zero sum counts as plus with "first"
(mergekit) and leaves the base with "all" (native). Shares no code with peta_fast.
Source: Yadav et al., NeurIPS 2023, arXiv:2306.01708.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Equals = Literal["first", "all"]
BLOCK = 1 << 22
BF16_EPS = 2.0**-7


def from_bf16(raw: np.ndarray) -> np.ndarray:
    """uint16 [n] -> fp32 [n]"""
    return (raw.astype(np.uint32) << 16).view(np.float32)


def to_bf16(values: np.ndarray) -> np.ndarray:
    """fp32 [n] -> uint16 [n], to nearest even; finite values only"""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


@dataclass(frozen=True)
class Trim:
    """What one task keeps: |d| > threshold, and the |d| equal to it up to flat index `last`."""

    threshold: np.float32
    last: int

    def keeps(self, delta: np.ndarray, start: int) -> np.ndarray:
        """bool [n] for the elements from flat index `start` on."""
        magnitude = np.abs(delta)
        place = np.arange(start, start + len(delta))
        return (magnitude > self.threshold) | ((magnitude == self.threshold) & (place <= self.last))


def trim_of(delta: np.ndarray, density: float, equals: Equals) -> Trim:
    """delta [n] fp32"""
    count = min(max(1, int(density * len(delta))), len(delta))
    magnitude = np.abs(delta)
    threshold = np.partition(magnitude, len(delta) - count)[len(delta) - count]
    if equals == "all":
        return Trim(threshold, len(delta))
    above = int(np.count_nonzero(magnitude > threshold))
    return Trim(threshold, int(np.flatnonzero(magnitude == threshold)[count - above - 1]))


@dataclass(frozen=True)
class Tensors:
    """One tensor of the base and of T models: bf16 as uint16 [n]."""

    base: np.ndarray
    models: tuple[np.ndarray, ...]

    def delta(self, task: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """fp32 [stop - start]"""
        return from_bf16(self.models[task][start:stop]) - from_bf16(self.base[start:stop])


def trims(tensors: Tensors, densities: Sequence[float], equals: Equals) -> list[Trim]:
    return [trim_of(tensors.delta(t), density, equals) for t, density in enumerate(densities)]


def kept_blocks(tensors: Tensors, found: Sequence[Trim]) -> Iterator[tuple[int, int, list[np.ndarray]]]:
    """(start, stop, T trimmed task vectors, fp32 [stop - start]), block by block."""
    for start in range(0, len(tensors.base), BLOCK):
        stop = min(start + BLOCK, len(tensors.base))
        deltas = [tensors.delta(t, start, stop) for t in range(len(found))]
        yield start, stop, [np.where(f.keeps(d, start), d, np.float32(0)) for f, d in zip(found, deltas, strict=True)]


def elected_mean(kept: Sequence[np.ndarray], weights: Sequence[float], equals: Equals) -> np.ndarray:
    """kept: T of fp32 [n] -> fp64 [n]"""
    sign = np.sign(weighted_sum(kept, weights))
    if equals == "first":
        sign[sign == 0] = 1
    merged, divisor = np.zeros(len(sign)), np.zeros(len(sign))
    for w, d in zip(weights, kept, strict=True):
        agrees = (np.sign(np.float32(w) * d) == sign) & (sign != 0)
        merged += np.where(agrees, w * d.astype(np.float64), 0)
        divisor += np.where(agrees, w, 0)
    return merged / np.where(divisor == 0, 1, divisor)


def weighted_sum(kept: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """fp32 [n], added in task order"""
    total = np.zeros_like(kept[0])
    for w, d in zip(weights, kept, strict=True):
        total = total + np.float32(w) * d
    return total


@dataclass(frozen=True)
class Error:
    """How far a merge stored in bf16 is from the exact one.

    largest   of |out - exact| / (2^-7 max(|exact|, |base|)) over the elements compared; rounding once gives at most 0.5
    off       elements where that exceeds 1, of `compared`
    """

    largest: float
    off: int
    compared: int

    def __add__(self, other: Error) -> Error:
        return Error(max(self.largest, other.largest), self.off + other.off, self.compared + other.compared)


NOTHING_COMPARED = Error(0.0, 0, 0)


def error_of(
    out: np.ndarray, tensors: Tensors, densities: Sequence[float], weights: Sequence[float], equals: Equals
) -> Error:
    """out uint16 [n], bf16"""
    found = trims(tensors, densities, equals)
    error = NOTHING_COMPARED
    for start, stop, kept in kept_blocks(tensors, found):
        merged = elected_mean(kept, weights, equals)
        error += _compared(out[start:stop], merged, tensors.base[start:stop], np.ones(stop - start, bool))
    return error


def error_where_clear(out: np.ndarray, tensors: Tensors, densities: Sequence[float], weights: Sequence[float]) -> Error:
    """The same for a merge that computes in bf16 and picks freely among equals, where neither decides:

    no |d_t|, rounded to bf16, is its task's threshold, rounded likewise, and the sum that elects is above its errors.
    """
    found = trims(tensors, densities, "first")
    error = NOTHING_COMPARED
    for start, stop, kept in kept_blocks(tensors, found):
        clear = ~_cancels_in_bf16(kept, weights)
        for t, trim in enumerate(found):
            clear &= to_bf16(np.abs(tensors.delta(t, start, stop))) != to_bf16(trim.threshold[None])[0]
        merged = elected_mean(kept, weights, "first")
        error += _compared(out[start:stop], merged, tensors.base[start:stop], clear)
    return error


def _cancels_in_bf16(kept: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """bool [n]: |sum w d| <= 2^-5 sum |w d|, T roundings of 2^-8 with some room"""
    total = np.abs(weighted_sum(kept, weights))
    size = weighted_sum([np.abs(d) for d in kept], np.abs(weights))
    return (total <= 2.0**-5 * size) & (size > 0)


def _compared(out: np.ndarray, merged: np.ndarray, base: np.ndarray, where: np.ndarray) -> Error:
    """merged: fp64 [n], what is added to the base"""
    exact = from_bf16(base).astype(np.float64) + merged
    scale = BF16_EPS * np.maximum(np.abs(exact), np.abs(from_bf16(base)))
    distance = np.abs(from_bf16(out) - exact)
    ratio = np.where(distance == 0, 0.0, distance / np.where(scale == 0, np.finfo(float).tiny, scale))[where]
    return Error(float(ratio.max(initial=0)), int(np.count_nonzero(ratio > 1)), int(np.count_nonzero(where)))


def plain_pytorch(base, models, densities: Sequence[float], weights: Sequence[float]):
    """One tensor as careful plain PyTorch merges it, in fp32: torch tensors in, one of base's dtype out."""
    import torch

    start = base.float()
    kept = []
    for model, density in zip(models, densities, strict=True):
        delta = model.float() - start
        magnitude = delta.abs().flatten()
        count = max(1, int(density * delta.numel()))
        threshold = magnitude.kthvalue(delta.numel() - count + 1).values
        kept.append(torch.where(delta.abs() >= threshold, delta, 0.0))
    stacked = torch.stack(kept)
    column = torch.tensor(weights, dtype=torch.float32).reshape(-1, *[1] * base.ndim)
    weighted = column * stacked
    sign = weighted.sum(0).sign()
    agrees = (weighted.sign() == sign) & (sign != 0)
    divisor = (column * agrees).sum(0)
    merged = (weighted * agrees).sum(0) / torch.where(divisor == 0, 1.0, divisor)
    return (start + merged).to(base.dtype)
