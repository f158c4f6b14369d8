"""Exact order statistics of |delta|: which magnitude is the k-th largest, and where its equals end.

    rank by (|delta| descending, index ascending);  threshold = |delta| of rank k

One streaming pass over base and models serves all tasks and densities of a tensor: 2 (T + 1) bytes an element in bf16.
Over a whole model, and over shards or machines, histograms of the magnitudes' bits add up: two passes, also exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from peta_fast.buffers import Buffer
from peta_fast.ops import backend, records


@dataclass(frozen=True)
class Rank:
    """The magnitude at one rank.

    threshold   bits of the fp32 |delta|, ordered as magnitudes are; ABS_MASK when nothing is kept
    last_index  with equals taken lowest index first, the last one that still belongs to the first k; -1 for none
    above       elements strictly above the threshold
    equal       elements equal to it
    """

    threshold: int
    last_index: int
    above: int = 0
    equal: int = 0

    @property
    def magnitude(self) -> float:
        return records.from_bits(self.threshold)


@dataclass(frozen=True)
class DeviceRank:
    """A Rank that only the device knows so far.

    query   address of its SELECT_QUERY record there
    memory  what must stay alive until whoever reads the record has been launched
    """

    query: int
    memory: Any = field(repr=False, compare=False)


NOTHING = Rank(records.ABS_MASK, -1)
EVERYTHING = Rank(0, records.LAST)


@dataclass(frozen=True)
class Selection:
    """Ranks wanted of one task vector: counts[j] = how many largest magnitudes to keep.

    index  whether last_index counts; a device leaves it out where it does not
    """

    base: Buffer | None
    x: Buffer
    counts: Sequence[int]
    base_kind: int = records.BASE_TENSOR
    group: int = 0
    index: bool = True


def kth_magnitudes(selections: Sequence[Selection], *, threads: int = 0) -> list[list[Rank | DeviceRank]]:
    """For every selection and each of its counts, the Rank of that many largest magnitudes.

    Where the tensors are a device's, so are the ranks: DeviceRanks, and nothing is waited for.

    Selections that follow each other with the same group share one pass over memory; they must have the same size.
    A count of 0 or less gives NOTHING, one of `size` or more EVERYTHING. NaN ranks above infinity.
    """
    tasks, queries, places = [], [], []
    for s in selections:
        inside = [k for k in s.counts if 0 < k < s.x.size]
        if inside:
            delta = records.delta_record(s.base, s.x, s.base_kind)
            tasks.append((delta, s.x.size, len(queries), s.group, len(inside), 0))
        queries.extend((k, 0, 0, 0, 0, int(bool(s.x.device) and not s.index)) for k in inside)
        places.append(inside)
    found = np.array(queries, records.SELECT_QUERY)
    device = selections[0].x.device if selections else ""
    if tasks and device:
        held = backend(device).start_select(np.array(tasks, records.SELECT_TASK), found)
        addresses = range(held.address, held.address + held.nbytes, records.SELECT_QUERY.itemsize)
        remaining = iter([DeviceRank(address, held) for address in addresses])
        return [[_trivial(k, s.x.size) or next(remaining) for k in s.counts] for s in selections]
    if tasks:
        backend().select_magnitudes(np.array(tasks, records.SELECT_TASK), found, threads)
    ranks = (Rank(q["threshold"], q["last_index"], q["above"], q["equal"]) for q in map(_as_ints, found))
    return [[_trivial(k, s.x.size) or next(ranks) for k in s.counts] for s in selections]


def _as_ints(record: np.void) -> dict[str, int]:
    return dict(zip(record.dtype.names, record.item(), strict=True))


def _trivial(count: int, size: int) -> Rank | None:
    return NOTHING if count <= 0 else EVERYTHING if count >= size else None


class MagnitudeHistogram:
    """The k-th largest |delta| over many tensors, in two passes over all of them.

    First `add` every tensor, then `narrow(counts)`, `add` every tensor again, then `thresholds(counts)`. Histograms of
    several shards or machines are added up by `merge`. One instance serves one task.
    """

    def __init__(self) -> None:
        self.high = np.zeros(65536, np.uint64)
        self.low: dict[int, np.ndarray] = {}
        self.narrowed = False
        self._bins: dict[tuple[str, int], Any] = {}  # of devices, by prefix; -1 for the first pass

    @property
    def size(self) -> int:
        """Elements added in the first pass."""
        self._collect()
        return int(self.high.sum())

    def add(self, base: Buffer | None, x: Buffer, *, base_kind: int = records.BASE_TENSOR, threads: int = 0) -> None:
        delta = np.array([records.delta_record(base, x, base_kind)], records.DELTA)
        if x.device:
            self._add_on_device(x.device, delta, x.size)
            return
        if not self.narrowed:
            backend().magnitude_histogram(delta, x.size, self.high, -1, threads)
        for prefix, bins in self.low.items():
            backend().magnitude_histogram(delta, x.size, bins, prefix, threads)

    def _add_on_device(self, device: str, delta: np.ndarray, size: int) -> None:
        """Into bins that stay there; nothing is waited for."""
        ops = backend(device)
        for prefix in self.low if self.narrowed else (-1,):
            if (device, prefix) not in self._bins:
                self._bins[device, prefix] = ops.zeros((65536 if prefix < 0 else 32768) * 8)
            ops.add_histogram(delta, size, prefix, self._bins[device, prefix])

    def _collect(self) -> None:
        """Takes what devices have counted."""
        for (device, prefix), held in self._bins.items():
            bins = self.high if prefix < 0 else self.low[prefix]
            bins += backend(device).download(held, np.uint64)
        self._bins = {}

    def merge(self, other: MagnitudeHistogram) -> None:
        self._collect()
        other._collect()
        self.high += other.high
        for prefix, bins in other.low.items():
            self.low[prefix] = self.low.get(prefix, 0) + bins

    def narrow(self, counts: Sequence[int]) -> None:
        """Ends the first pass: from now on only the bins that hold these ranks are looked into."""
        inside = {self._prefix(k)[0] for k in counts if 0 < k < self.size}
        self.narrowed = True
        self.low = {prefix: np.zeros(32768, np.uint64) for prefix in sorted(inside)}

    def thresholds(self, counts: Sequence[int]) -> list[Rank]:
        """The Rank of each count, equals not told apart (last_index is that of all)."""
        self._collect()
        return [_trivial(k, self.size) or self._rank(k) for k in counts]

    def _prefix(self, count: int) -> tuple[int, int]:
        return _bin_of_rank(self.high, count, 0)

    def _rank(self, count: int) -> Rank:
        prefix, above = self._prefix(count)
        low, above = _bin_of_rank(self.low[prefix], count, above)
        return Rank(prefix << 15 | low, records.LAST, above, int(self.low[prefix][low]))


def _bin_of_rank(bins: np.ndarray, count: int, above: int) -> tuple[int, int]:
    """The highest bin at which `above` plus the bins from the top reach count, and what lies above that bin."""
    from_top = np.cumsum(bins[::-1]) + np.uint64(above)
    position = int(np.searchsorted(from_top, np.uint64(count)))
    higher = int(from_top[position - 1]) if position else above
    return len(bins) - 1 - position, higher
