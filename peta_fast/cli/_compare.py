"""Two checkpoints, value by value, tile by tile: memory is bounded whatever their size."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from peta_fast.buffers import ITEMSIZE, LONG_NAMES, MERGEABLE, Buffer
from peta_fast.cli._checkpoints import raw_bytes, tiles, values
from peta_fast.cli._statistics import statistics
from peta_fast.formats import Checkpoint
from peta_fast.ops.task_statistics import task_statistics


@dataclass(frozen=True)
class Differing:
    """One tensor whose values differ.

    elements  how many do
    norm      Euclidean, of A - B
    relative  norm / norm of A
    largest   |A - B|
    index, a, b  the first that differs
    """

    name: str
    elements: int
    norm: float
    relative: float
    largest: float
    index: tuple[int, ...]
    a: Any
    b: Any


@dataclass
class Comparison:
    """What differs between checkpoints A and B. unlike: (name, "float32 [2, 3]" in A, the same in B)."""

    only_in_a: list[str] = field(default_factory=list)
    only_in_b: list[str] = field(default_factory=list)
    unlike: list[tuple[str, str, str]] = field(default_factory=list)
    differing: list[Differing] = field(default_factory=list)
    equal: int = 0

    @property
    def same(self) -> bool:
        return not (self.only_in_a or self.only_in_b or self.unlike or self.differing)


def compare(a: Checkpoint, b: Checkpoint, tolerance: float | None) -> Comparison:
    """Tied tensors count under each of their names.

    tolerance  largest |A - B| that counts as equal; None compares bits. NaN equals NaN.
    """
    found = Comparison()
    names_a, names_b = dict.fromkeys([*a.tensors, *a.aliases]), dict.fromkeys([*b.tensors, *b.aliases])
    found.only_in_a = [name for name in names_a if name not in names_b]
    found.only_in_b = [name for name in names_b if name not in names_a]
    for name in (name for name in names_a if name in names_b):
        kinds = _kind(a, name), _kind(b, name)
        if kinds[0] != kinds[1]:
            found.unlike.append((name, *kinds))
        if a.tensors[a.aliases.get(name, name)].shape != b.tensors[b.aliases.get(name, name)].shape:
            continue
        difference = _compare_tensor(name, a, b, tolerance)
        if difference is not None:
            found.differing.append(difference)
        elif kinds[0] == kinds[1]:
            found.equal += 1
    return found


def _kind(checkpoint: Checkpoint, name: str) -> str:
    info = checkpoint.tensors[checkpoint.aliases.get(name, name)]
    return f"{LONG_NAMES[info.dtype]} {list(info.shape)}"


def _compare_tensor(name: str, a: Checkpoint, b: Checkpoint, tolerance: float | None) -> Differing | None:
    """None when all elements are equal."""
    info = a.tensors[a.aliases.get(name, name)]
    elements, first = 0, None
    for start, stop in tiles(info.size):
        x, y = a.buffer(name, start, stop), b.buffer(name, start, stop)
        differs = _differs(x, y, tolerance)
        count = int(np.count_nonzero(differs))
        if count and first is None:
            first = start + int(np.argmax(differs))
        elements += count
    if first is None:
        return None
    whole_a, whole_b = a.buffer(name), b.buffer(name)
    norm, largest = _distance(whole_a, whole_b)
    norm_a = statistics(whole_a).norm
    relative = norm / norm_a if norm_a else float("inf") if norm else 0.0
    index = tuple(int(i) for i in np.unravel_index(first, info.shape))
    return Differing(name, elements, norm, relative, largest, index, _element(whole_a, first), _element(whole_b, first))


def _element(buffer: Buffer, index: int) -> Any:
    return values(buffer.slice(index, index + 1))[0].item()


def _differs(a: Buffer, b: Buffer, tolerance: float | None) -> np.ndarray:
    """[size] bool"""
    if a.dtype == b.dtype:
        code = f"u{ITEMSIZE[a.dtype]}"
        other_bits = raw_bytes(a).view(code) != raw_bytes(b).view(code)
        if tolerance is None or not other_bits.any():
            return other_bits
    x, y = values(a), values(b)
    return ~(_equal(x, y) | (_absolute_difference(x, y) <= (tolerance or 0.0)))


def _distance(a: Buffer, b: Buffer) -> tuple[float, float]:
    """Euclidean and largest distance, to within 2^-24; equal infinities, and NaN beside NaN, are no distance."""
    if a.dtype in MERGEABLE and b.dtype in MERGEABLE:
        found = task_statistics(b, [a])
        if not found.nonfinite[0]:
            return float(found.l2[0]), float(found.largest[0])
    squares = largest = 0.0
    for tile in tiles(a.size):
        x, y = values(a.slice(*tile)), values(b.slice(*tile))
        distance = np.where(_equal(x, y), 0.0, _absolute_difference(x, y))
        squares += float(np.square(distance).sum())
        largest = float(np.maximum(largest, distance.max()))
    return squares**0.5, largest


def _equal(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x == y) | ((x != x) & (y != y))


def _absolute_difference(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """fp64"""
    wide = np.complex128 if "c" in (x.dtype.kind, y.dtype.kind) else np.float64
    with np.errstate(over="ignore", invalid="ignore"):
        return np.abs(x.astype(wide) - y.astype(wide))
