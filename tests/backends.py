"""The backends and instruction sets that must give the same bits, and arrays of every dtype as the buffers they take.

bf16 is held in uint16, as everywhere in the package. "stored" is an array as it lies in memory; "wide" is its fp32.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from unittest import mock

import numpy as np
from host_build import host_ops

from peta_fast._native import native
from peta_fast.buffers import Buffer
from peta_fast.ops import delta_merge, merge_variants, order_statistics, plain, task_statistics

NATIVE = native()
LEVELS = ("baseline", "avx2", "avx512")
SIMD = LEVELS[: LEVELS.index(NATIVE.best_simd()) + 1] if NATIVE else ()
"""The instruction sets of this CPU; none where the native module is not built."""
BACKENDS = ("plain", *SIMD)
DTYPES = ("F32", "F16", "BF16")
STORED = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(np.uint16)}
CANARY = 0xA5
GUARD = 64
"""Bytes around every output, which must stay as they are."""


@contextlib.contextmanager
def running_on(name: str) -> Iterator[ModuleType]:
    """The operations run on plain numpy, natively on one instruction set, or on the host build of the CUDA kernels
    ("cuda"), until the end of the block."""
    module = plain if name == "plain" else host_ops() if name == "cuda" else NATIVE
    before = NATIVE.simd() if NATIVE else ""
    with contextlib.ExitStack() as stack:
        for op in (delta_merge, merge_variants, order_statistics, task_statistics):
            stack.enter_context(mock.patch.object(op, "backend", lambda device="": module))
        if name in LEVELS:
            assert module.set_simd(name), name
            stack.callback(module.set_simd, before)
        yield module


def same_on_every_backend(run: Callable[[ModuleType, int], np.ndarray], threads: Sequence[int] = (1, 3)) -> np.ndarray:
    """run(module, threads) gives one array; the same bytes must come from every backend and number of threads."""
    with running_on("plain") as module:
        expected = run(module, 1)
    for name in SIMD:
        for count in threads:
            with running_on(name) as module:
                actual = run(module, count)
            assert_same_bits(actual, expected, f"{name} on {count} threads, against plain")
    return expected


def assert_same_bits(actual: np.ndarray, expected: np.ndarray, who: str = "") -> None:
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, f"{who}: {actual.dtype}{actual.shape}"
    bits = np.dtype(f"u{actual.itemsize}")
    wrong = np.flatnonzero(actual.reshape(-1).view(bits) != expected.reshape(-1).view(bits))
    assert not len(wrong), (
        f"{who}: {len(wrong)} of {actual.size} elements differ, first {wrong[0]}: "
        f"expected {expected.reshape(-1)[wrong[0]]!r}, got {actual.reshape(-1)[wrong[0]]!r}"
    )


def store(wide: np.ndarray, dtype: str) -> np.ndarray:
    """fp32 rounded to nearest even in `dtype`."""
    wide = np.ascontiguousarray(wide, np.float32)
    if dtype != "BF16":
        with np.errstate(over="ignore"):
            return wide.astype(STORED[dtype])
    u = wide.view(np.uint32).astype(np.uint64)
    return ((u + 0x7FFF + (u >> np.uint64(16) & np.uint64(1))) >> np.uint64(16)).astype(np.uint16)


def widen(stored: np.ndarray, dtype: str) -> np.ndarray:
    return (stored.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else stored.astype(np.float32)


def buffer_of(array: np.ndarray, dtype: str, offset: int = 0) -> Buffer:
    """A copy of the array's bytes, `offset` bytes into memory of its own that ends where they do."""
    raw = np.full(offset + array.nbytes, CANARY, np.uint8)
    raw[offset:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return Buffer(raw.ctypes.data + offset, dtype, array.size, raw)


def output_of(size: int, dtype: str, offset: int = 0) -> Buffer:
    """Room for `size` elements, all bytes 0xFF (NaN in every dtype), `offset` bytes past a multiple of 64."""
    nbytes = size * STORED[dtype].itemsize
    raw = np.full(nbytes + 64 + offset + 2 * GUARD, CANARY, np.uint8)
    start = -raw.ctypes.data % 64 + GUARD + offset
    raw[start : start + nbytes] = 0xFF
    return Buffer(raw.ctypes.data + start, dtype, size, raw)


def contents(buffer: Buffer) -> np.ndarray:
    """A copy of the stored elements; nothing beside them may have been written."""
    raw, start = buffer.owner, buffer.address - buffer.owner.ctypes.data
    beside = np.concatenate([raw[:start], raw[start + buffer.nbytes :]])
    assert (beside == CANARY).all(), f"{np.count_nonzero(beside != CANARY)} bytes outside the buffer were written"
    return raw[start : start + buffer.nbytes].view(STORED[buffer.dtype]).copy()


def memory_before_an_unmapped_page(array: np.ndarray) -> np.ndarray:
    """A copy of the array that ends where a page begins that nobody may touch, as at the end of a mapped file."""
    pages = -(-array.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    whole = np.frombuffer(mmap.mmap(-1, pages + mmap.PAGESIZE), np.uint8)
    beyond = ctypes.c_void_p(whole.ctypes.data + pages)
    assert ctypes.CDLL(None).mprotect(beyond, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    copy = whole[pages - array.nbytes : pages].view(array.dtype)
    copy[:] = array
    return copy
