"""The least time that bytes take on this machine: copies in memory, reads of files, durable writes. Two threads each.

Every floor is tried in all ways listed here, and the fastest counts:
- copy: the native copy in pieces of 4 MiB; one memmove a thread, which stores past the cache
- read in memory: the native checksum; sums of 64-bit words by numpy
- read files: the same two over a memory map; memmove from the map, and pread, into a buffer that stays in the cache
- write files, fsync included: O_DIRECT from an aligned buffer; stores into a mapped file; buffered pwrite
- read and write: one after the other on both threads, or at the same time on one thread each
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from peta_fast._native import native

THREADS = 2
PIECE = 16 << 20
CACHED = 256 << 10
PAGE = 4096
Run = tuple[int, int]
"""Address and number of bytes."""


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def aligned(nbytes: int, fill: int = 0) -> np.ndarray:
    """uint8 [nbytes] at a page's start, every page touched."""
    whole = np.empty(nbytes + PAGE, np.uint8)
    skip = -address(whole) % PAGE
    whole[:] = fill
    return whole[skip : skip + nbytes]


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def words_at(run: Run) -> np.ndarray:
    """The whole 64-bit words of a run of bytes, without a copy."""
    start, nbytes = run
    start, nbytes = start + (-start % 8), nbytes - (-start % 8)
    return np.frombuffer((ctypes.c_uint8 * (nbytes // 8 * 8)).from_address(start), np.uint64)


def in_pieces(runs: Iterable[Run], size: int = PIECE) -> list[Run]:
    return [(start + at, min(size, nbytes - at)) for start, nbytes in runs for at in range(0, nbytes, size)]


def on_threads(work: Callable[..., object], pieces: Iterable, threads: int = THREADS) -> None:
    """work(piece) for every piece, pulled one by one by this many threads."""
    todo = iter(list(pieces))

    def pull(_: int) -> None:
        for piece in todo:
            work(piece)

    if threads == 1:
        return pull(0)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(pull, range(threads)))


# ------------------------------------------------------------------------------------------------ memory


def copies(pairs: Sequence[tuple[int, int, int]]) -> dict[str, float]:
    """Seconds to copy (target, source, nbytes) of all pairs, each byte read once and written once, by way."""
    halves = [(t + at, s + at, n) for t, s, whole in pairs for at, n in _halves(whole)]
    ways = {"memmove": lambda: on_threads(lambda piece: ctypes.memmove(*piece), halves)}
    module = native()
    if module:
        ways["native copy"] = lambda: [module.copy_bytes(*pair, THREADS) for pair in pairs]
    return {name: seconds(way) for name, way in ways.items()}


def _halves(nbytes: int) -> list[tuple[int, int]]:
    middle = nbytes // 2 // PAGE * PAGE
    return [(0, middle), (middle, nbytes - middle)]


def reads(runs: Sequence[Run], threads: int = THREADS) -> dict[str, float]:
    """Seconds to read all runs of memory once, by way."""
    ways = {"numpy sum": lambda: on_threads(lambda run: words_at(run).sum(), in_pieces(runs), threads)}
    module = native()
    if module:
        ways["native checksum"] = lambda: [module.checksum(*run, threads) for run in runs]
    return {name: seconds(way) for name, way in ways.items()}


# ------------------------------------------------------------------------------------------------ files


@contextmanager
def mapped(files: Iterable[Path]):
    """The runs of memory that show these files."""
    maps = []
    for file in files:
        with open(file, "rb") as stream:
            maps.append(mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ))
    views = [np.frombuffer(m, np.uint8) for m in maps]
    try:
        yield [(address(view), view.nbytes) for view in views]
    finally:
        views.clear()
        for m in maps:
            m.close()


def read_mapped_checksum(files: Sequence[Path], threads: int = THREADS) -> None:
    with mapped(files) as runs:
        for run in runs:
            native().checksum(*run, threads)


def read_mapped_sum(files: Sequence[Path], threads: int = THREADS) -> None:
    with mapped(files) as runs:
        on_threads(lambda run: words_at(run).sum(), in_pieces(runs), threads)


def read_mapped_memmove(files: Sequence[Path], threads: int = THREADS) -> None:
    with mapped(files) as runs:
        buffers = _one_each(threads)
        on_threads(lambda run: ctypes.memmove(buffers(), *run), in_pieces(runs, CACHED), threads)


def read_pread(files: Sequence[Path], threads: int = THREADS) -> None:
    streams = [os.open(file, os.O_RDONLY) for file in files]
    buffers = [aligned(CACHED) for _ in range(threads + 1)]
    turn = itertools.count()
    pieces = [(fd, at) for fd in streams for at in range(0, os.fstat(fd).st_size, CACHED)]
    try:
        on_threads(lambda p: os.preadv(p[0], [buffers[next(turn) % len(buffers)]], p[1]), pieces, threads)
    finally:
        for fd in streams:
            os.close(fd)


def _one_each(threads: int) -> Callable[[], int]:
    """Addresses of small buffers by turns. What they hold is of no interest, so that two threads may share one."""
    buffers = [aligned(CACHED) for _ in range(threads + 1)]
    turn = itertools.count()
    return lambda: address(buffers[next(turn) % len(buffers)])


READ_WAYS: dict[str, Callable[..., None]] = {
    "mapped, numpy sum": read_mapped_sum,
    "mapped, memmove": read_mapped_memmove,
    "pread": read_pread,
}
if native():
    READ_WAYS["mapped, native checksum"] = read_mapped_checksum


def write_direct(file: Path, nbytes: int, source: np.ndarray, threads: int = THREADS) -> None:
    """Past the page cache; the last page is written whole and cut off."""
    fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT)
    try:
        whole = -(-nbytes // PAGE) * PAGE
        os.posix_fallocate(fd, 0, whole)
        _write_pieces(fd, whole, source, threads)
        os.ftruncate(fd, nbytes)
        os.fsync(fd)
    finally:
        os.close(fd)


def write_buffered(file: Path, nbytes: int, source: np.ndarray, threads: int = THREADS) -> None:
    fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        _write_pieces(fd, nbytes, source, threads)
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_pieces(fd: int, nbytes: int, source: np.ndarray, threads: int) -> None:
    def write(at: int) -> None:
        wanted = min(len(source), nbytes - at)
        if os.pwrite(fd, source[:wanted], at) != wanted:
            raise OSError(f"a write of {wanted} bytes at {at} fell short")

    on_threads(write, range(0, nbytes, len(source)), threads)


def write_mapped(file: Path, nbytes: int, source: np.ndarray, threads: int = THREADS) -> None:
    fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    try:
        os.posix_fallocate(fd, 0, nbytes)
        with mmap.mmap(fd, nbytes) as target:
            start = address(np.frombuffer(target, np.uint8))
            pieces = in_pieces([(start, nbytes)], len(source))
            on_threads(lambda run: ctypes.memmove(run[0], address(source), run[1]), pieces, threads)
        os.fsync(fd)
    finally:
        os.close(fd)


WRITE_WAYS: dict[str, Callable[..., None]] = {
    "O_DIRECT": write_direct,
    "mapped": write_mapped,
    "buffered": write_buffered,
}


class FileFloor:
    """Time to read all inputs once and to write and fsync as many bytes as the output: the best of all rounds so far.

    inputs   files that are read
    nbytes   bytes written
    scratch  where they are written to, on the disk that the output goes to; removed after each round
    """

    def __init__(self, inputs: Sequence[Path], nbytes: int, scratch: Path):
        self.inputs, self.nbytes, self.scratch = list(inputs), nbytes, scratch
        self.source = aligned(PIECE)
        self.source[:] = np.random.default_rng(0).integers(0, 256, PIECE, np.uint8)
        self.times: dict[str, list[float]] = {}

    def measure(self) -> None:
        """One round of every way, then reading and writing at once by the two ways that are fastest so far."""
        for name, way in READ_WAYS.items():
            self._add(f"read: {name}", lambda way=way: way(self.inputs))
        for name, way in WRITE_WAYS.items():
            self._add(f"write: {name}", lambda way=way: self._write(way, THREADS))
        self._add("at once", self._at_once)

    def _add(self, name: str, work: Callable[[], object]) -> None:
        try:
            self.times.setdefault(name, []).append(seconds(work))
        except OSError:  # a filesystem without O_DIRECT
            if not self.times[name]:
                del self.times[name]
        finally:
            self.scratch.unlink(missing_ok=True)

    def _write(self, way: Callable[..., None], threads: int) -> None:
        way(self.scratch, self.nbytes, self.source, threads)

    def _at_once(self) -> None:
        read, write = READ_WAYS[self.best_way("read")], WRITE_WAYS[self.best_way("write")]
        with ThreadPoolExecutor(2) as pool:
            both = [pool.submit(self._write, write, 1), pool.submit(read, self.inputs, 1)]
            [one.result() for one in both]

    def best_way(self, kind: str) -> str:
        found = {name: min(times) for name, times in self.times.items() if name.startswith(kind) and times}
        return min(found, key=found.__getitem__).partition(": ")[2]

    def best(self, kind: str) -> float:
        return min(self.times[f"{kind}: {self.best_way(kind)}"])

    @property
    def seconds(self) -> float:
        return min(self.best("read") + self.best("write"), min(self.times["at once"]))

    def details(self) -> dict[str, object]:
        return {
            "read_seconds": self.best("read"),
            "read_way": self.best_way("read"),
            "write_seconds": self.best("write"),
            "write_way": self.best_way("write"),
            "at_once_seconds": min(self.times["at once"]),
            "all": {name: min(times) for name, times in self.times.items()},
        }
