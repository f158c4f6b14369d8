"""The operations on a device's memory: the functions of the native CPU module, and forms of them that do not wait.

A device is "cuda:N", or "host": the host build of the same kernels, whose device is the host's memory, for tests.
Kernels run on torch's current stream, memory comes from torch's allocator, nothing is kept between calls.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from peta_fast._cuda import Library, Place, require
from peta_fast.errors import ResourceError
from peta_fast.ops import records as r

RANK_REF = np.dtype(
    [("query", "u8"), ("task", "i8"), ("first", "i8"), ("high", "i4"), ("all", "i4")], align=True
)  # fmt: skip
"""A threshold of a TASK record that stands in a SELECT_QUERY on the device; csrc/order_statistics/ranks.cu."""
TILE = np.dtype([("piece", "i4"), ("index", "i4")])
LAUNCH = np.dtype([("first_tile", "i8"), ("tiles", "i8"), ("kernel", "i4"), ("pad", "i4")])
MOST_LAUNCHES = 32
TREE_WIDTH = 2048
MORE_MEMORY = (
    "Free some of it, merge on the CPU, or merge files with `peta-fast merge --device cuda`, which needs no room for "
    "whole models."
)
KEY_BYTES = 256 << 20
"""Bytes of sort keys at once, when rows are ranked."""


@dataclass(frozen=True)
class Held:
    """A run of a device's memory; it lives as long as this does."""

    address: int
    nbytes: int
    owner: Any = field(repr=False, compare=False)


class Memory(Protocol):
    """How a device's memory is had."""

    name: str

    def place(self) -> Place: ...
    def current(self) -> contextlib.AbstractContextManager: ...
    def empty(self, nbytes: int) -> Held: ...
    def upload(self, array: np.ndarray) -> Held: ...
    def download(self, address: int, nbytes: int) -> np.ndarray: ...
    def pinned(self, nbytes: int) -> Held: ...
    def new_stream(self) -> Any: ...
    def on(self, stream: Any) -> contextlib.AbstractContextManager: ...
    def mark(self) -> Callable[[], None]: ...
    def free_bytes(self) -> int: ...


class HostMemory:
    """The host's own memory, for the host build. Fresh memory is full of 0xA5."""

    name = "host"

    def place(self) -> Place:
        return Place(0, None)

    def current(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def empty(self, nbytes: int) -> Held:
        raw = np.full(nbytes + 256, 0xA5, np.uint8)
        return Held(-(-raw.ctypes.data // 256) * 256, nbytes, raw)

    def upload(self, array: np.ndarray) -> Held:
        held = self.empty(array.nbytes)
        ctypes.memmove(held.address, array.ctypes.data, array.nbytes)
        return held

    def download(self, address: int, nbytes: int) -> np.ndarray:
        out = np.empty(nbytes, np.uint8)
        ctypes.memmove(out.ctypes.data, address, nbytes)
        return out

    pinned = empty

    def new_stream(self) -> Any:
        return None

    def on(self, stream: Any) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def mark(self) -> Callable[[], None]:
        return lambda: None

    def free_bytes(self) -> int:
        return 4 << 30


class TorchMemory:
    """One GPU, by way of torch's current stream and its allocators."""

    def __init__(self, index: int):
        import torch

        self.torch, self.index, self.name = torch, index, f"cuda:{index}"
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if index >= count:
            raise ResourceError(self.name, f"expected one of the GPUs that torch sees, which are {count}",
                                "Install a torch with CUDA, or merge on the CPU.")  # fmt: skip
        self.device = torch.device("cuda", index)

    def place(self) -> Place:
        return Place(self.index, self.torch.cuda.current_stream(self.device).cuda_stream)

    def current(self) -> contextlib.AbstractContextManager:
        """The library makes the device current, by a CUDA runtime of its own; torch must find again what it had."""
        return self.torch.cuda.device(self.device)

    def empty(self, nbytes: int) -> Held:
        try:
            owner = self.torch.empty(max(nbytes, 1), dtype=self.torch.uint8, device=self.device)
        except self.torch.OutOfMemoryError as error:
            raise out_of_memory(self.name, nbytes, error) from error
        return Held(owner.data_ptr(), nbytes, owner)

    def upload(self, array: np.ndarray) -> Held:
        """Does not wait: the staging memory is pinned, and torch keeps it until it has been read."""
        held = self.empty(array.nbytes)
        if array.nbytes:
            staging = self.pinned(array.nbytes).owner
            staging.numpy()[:] = array.reshape(-1).view(np.uint8)
            with self.faults():
                held.owner.copy_(staging, non_blocking=True)
        return held

    def download(self, address: int, nbytes: int) -> np.ndarray:
        """Waits for everything on the current stream."""
        with self.faults():
            return device_bytes(address, nbytes, self.device).cpu().numpy()

    def pinned(self, nbytes: int) -> Held:
        """Memory of the host that copies to and from the device need not stage."""
        with self.faults(), self.current():
            owner = self.torch.empty(max(nbytes, 1), dtype=self.torch.uint8, device="cpu", pin_memory=True)
        return Held(owner.data_ptr(), nbytes, owner)

    def new_stream(self) -> Any:
        return self.torch.cuda.Stream(self.device)

    def on(self, stream: Any) -> contextlib.AbstractContextManager:
        """The stream is the current one within."""
        return self.torch.cuda.stream(stream)

    def mark(self) -> Callable[[], None]:
        """What waits for all that the current stream has been given so far."""
        event = self.torch.cuda.Event()
        event.record(self.torch.cuda.current_stream(self.device))

        def wait() -> None:
            with self.faults():
                event.synchronize()

        return wait

    @contextlib.contextmanager
    def faults(self) -> Iterator[None]:
        """What CUDA reports by way of torch, among it the faults of kernels that ran before, as ResourceError."""
        try:
            yield
        except self.torch.OutOfMemoryError as error:
            raise ResourceError(self.name, f"expected more memory: {_first_line(error)}", MORE_MEMORY) from error
        except RuntimeError as error:
            if "CUDA" not in str(error):
                raise
            raise ResourceError(
                self.name, f"the GPU failed: {_first_line(error)}",
                "The process cannot use it any more: start again, with CUDA_LAUNCH_BLOCKING=1 to see where it fails.",
            ) from error  # fmt: skip

    def free_bytes(self) -> int:
        return self.torch.cuda.mem_get_info(self.device)[0]


def device_bytes(address: int, nbytes: int, device: Any) -> Any:
    """uint8 torch tensor over memory of a GPU, without a copy; whoever owns the memory must outlive it."""
    import torch

    if not nbytes:
        return torch.empty(0, dtype=torch.uint8, device=device)
    interface = {"data": (address, False), "shape": (nbytes,), "typestr": "|u1", "version": 3, "strides": None}
    holder = type("DeviceBytes", (), {"__cuda_array_interface__": interface})()
    return torch.as_tensor(holder, device=device)


def out_of_memory(device: str, nbytes: int, error: BaseException) -> ResourceError:
    said = _first_line(error).partition(" See documentation")[0]
    return ResourceError(device, f"expected {nbytes:,} more bytes of GPU memory: {said}", MORE_MEMORY)


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


@functools.cache
def of_device(name: str) -> DeviceOps:
    """The operations on "cuda:N" or "host". Raises ResourceError where the library is missing or of another kind."""
    library = require()
    if (library.kind == "host") != (name == "host"):
        raise ResourceError(name, f"expected a library of its kind, got {library.path}, which is {library.kind}")
    return DeviceOps(library, HostMemory() if name == "host" else TorchMemory(int(name.partition(":")[2])))


class DeviceOps:
    """Tables are numpy records on the host; every address within them is the device's."""

    def __init__(self, library: Library, memory: Memory):
        self.library, self.memory = library, memory

    def call(self, name: str, *arguments) -> None:
        with self.memory.current():
            self.library.call(name, self.memory.place(), *arguments)

    def upload_together(self, *arrays: np.ndarray) -> tuple[Held, list[int]]:
        """All arrays in one copy; their addresses."""
        offsets, end = [], 0
        for array in arrays:
            offsets.append(end)
            end += -(-array.nbytes // 64) * 64
        blob = np.zeros(end, np.uint8)
        for array, offset in zip(arrays, offsets, strict=True):
            blob[offset : offset + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        held = self.memory.upload(blob)
        return held, [held.address + offset for offset in offsets]

    # ---------------------------------------------------------------- the fused merge

    def start_merge(self, mode: int, pieces, tasks, rules, refs: np.ndarray | None = None) -> Held:
        """Launches, and returns the device's copy of the pieces, which holds the results when the stream gets there.

        refs: RANK_REF records, thresholds that are still the device's own business.
        """
        pieces = pieces.copy()
        pieces["nonfinite"], pieces["sign_total"] = 0, 0
        count = self.library.raw.peta_merge_tiles(mode, pieces.ctypes.data, len(pieces))
        if count < 0:
            raise ResourceError("delta_merge", "a tensor has more elements than one call can take")
        tiles, launches = np.empty(max(count, 1), TILE), np.empty(MOST_LAUNCHES, LAUNCH)
        kernels = np.empty(len(pieces), np.uint8)
        tasks = np.ascontiguousarray(tasks)
        layout = (a.ctypes.data for a in (tasks, rules, tiles, launches, kernels))
        number = self.library.raw.peta_merge_layout(mode, pieces.ctypes.data, len(pieces), *layout)
        if number < 0:
            raise ResourceError("delta_merge", "a median of so many tasks does not fit a GPU", "Merge on the CPU.")
        refs = np.empty(0, RANK_REF) if refs is None else refs
        held, (p, t, u, k, f) = self.upload_together(pieces, tasks, rules, tiles, refs)
        if len(refs):
            self.call("set_thresholds", t, f, len(refs))
        self.call("delta_merge", p, t, u, k, launches.ctypes.data, number)
        return Held(p, pieces.nbytes, held)

    def pieces_of(self, held: Held) -> np.ndarray:
        """The PIECE records that a merge has left; waits for it."""
        return self.memory.download(held.address, held.nbytes).view(r.PIECE)

    def delta_merge(self, mode: int, pieces, tasks, rules, threads: int = 0) -> None:
        if len(pieces):
            pieces[:] = self.pieces_of(self.start_merge(mode, pieces, tasks, rules))

    # ---------------------------------------------------------------- order statistics

    def start_select(self, tasks, queries) -> Held:
        """Launches, and returns the device's SELECT_QUERY records. A query whose `pad` is 1 wants no index."""
        sizes = [ctypes.c_int64() for _ in range(3)]
        given = (tasks.ctypes.data, len(tasks), queries.ctypes.data, len(queries))
        self.library.raw.peta_select_sizes(*given, *(ctypes.byref(s) for s in sizes))
        blob, scratch = np.zeros(sizes[0].value, np.uint8), self.memory.empty(sizes[1].value)
        self.library.raw.peta_select_fill(*given, blob.ctypes.data, scratch.address)
        held = self.memory.upload(blob)
        self.call("select", blob.ctypes.data, held.address, scratch.address)
        return Held(held.address + sizes[2].value, queries.nbytes, held)

    def select_magnitudes(self, tasks, queries, threads: int = 0) -> None:
        if len(tasks):
            found = self.start_select(np.ascontiguousarray(tasks), np.ascontiguousarray(queries))
            queries[:] = self.memory.download(found.address, found.nbytes).view(r.SELECT_QUERY)

    def add_histogram(self, delta, size: int, prefix: int, bins: Held) -> None:
        """Adds to uint64 bins on the device; does not wait."""
        self.call("histogram", delta.ctypes.data, size, prefix, bins.address)

    def magnitude_histogram(self, delta, size: int, bins, prefix: int, threads: int = 0) -> None:
        held = self.memory.upload(bins)
        self.add_histogram(delta, size, prefix, held)
        bins[:] = self.memory.download(held.address, held.nbytes).view(np.uint64)

    def start_ranking(self, delta, begin_row: int, rows: int, columns: int, low: float, high: float) -> Held:
        """fp32 [rows, columns] on the device: keep probabilities by rank; does not wait."""
        out, row_bytes = self.memory.empty(rows * columns * 4), self.library.raw.peta_row_bytes(columns)
        at_once = max(KEY_BYTES // row_bytes, 1)
        keys = self.memory.empty(min(at_once, max(rows, 1)) * row_bytes)
        for first in range(0, rows, at_once):
            target, count = out.address + first * columns * 4, min(at_once, rows - first)
            source = (delta.ctypes.data, begin_row + first, count, columns, low, high)
            self.call("ranked_probability", *source, keys.address, target)
        return out

    def ranked_probability(self, delta, begin_row, rows, columns, low, high, out, threads: int = 0) -> None:
        held = self.start_ranking(delta, begin_row, rows, columns, low, high)
        out[: rows * columns] = self.memory.download(held.address, held.nbytes).view(np.float32)

    # ---------------------------------------------------------------- sums

    def tree_sums(self, values: Held, count: int, width: int) -> Held:
        """fp64 [width]: sums over the first dimension of [count, width], which are overwritten; does not wait."""
        scratch, sums = self.memory.empty(-(-count // TREE_WIDTH) * width * 8), self.memory.empty(width * 8)
        self.call("tree_sums", values.address, count, width, scratch.address, sums.address)
        return sums

    def tree_sum(self, values) -> float:
        values = np.ascontiguousarray(values, np.float64)
        sums = self.tree_sums(self.memory.upload(values), len(values), 1)
        return float(self.memory.download(sums.address, 8).view(np.float64)[0])

    def task_statistics(self, deltas, size: int, threads: int = 0) -> dict[str, np.ndarray]:
        count = len(deltas)
        width, pairs = 2 * count + count * (count + 1) // 2, count * (count - 1) // 2
        blocks = -(-size // r.BLOCK)
        partials = self.memory.empty(blocks * width * 8)
        scratch = self.memory.empty(-(-blocks // TREE_WIDTH) * width * 8)
        counts = 2 * count + pairs + 1
        out = self.memory.empty((width + counts) * 8 + count * 4)
        at_counts, at_largest = out.address + width * 8, out.address + (width + counts) * 8
        table = self.memory.upload(np.ascontiguousarray(deltas))
        memory = (partials.address, scratch.address, out.address, at_counts, at_largest)
        self.call("task_statistics", table.address, count, size, *memory)
        raw = self.memory.download(out.address, out.nbytes)
        found = raw[width * 8 : (width + counts) * 8].view(np.int64)
        return {
            "sums": raw[: width * 8].view(np.float64),
            "nonfinite": found[:count],
            "nonzero": found[count : 2 * count],
            "largest": raw[(width + counts) * 8 :].view(np.uint32),
            "conflicts": found[2 * count : 2 * count + pairs],
            "any_conflict": found[-1:],
        }

    def count_mask(self, address: int, size: int, bits: bool) -> int:
        """Set bits, or bytes that are not zero, of a mask of `size` elements."""
        count = self.memory.empty(8)
        self.call("count_mask", address, size, int(bits), count.address)
        return int(self.memory.download(count.address, 8).view(np.int64)[0])

    def copy_bytes(self, to: int, source: int, count: int, threads: int = 0) -> None:
        """Does not wait."""
        self.call("copy", to, source, count)

    def zeros(self, nbytes: int) -> Held:
        return self.memory.upload(np.zeros(nbytes, np.uint8))

    def download(self, held: Held, dtype: Any) -> np.ndarray:
        return self.memory.download(held.address, held.nbytes).view(dtype)
