"""Marks of weights: whether a tensor holds the values that something was made from, told by a few runs of them.

    runs    16 of 64 elements, evenly over the tensor in row-major order; all of a tensor of at most 1024
    mark    "<dtype> <a> <b> <c>": BLAKE2b, 8 bytes each, of the runs as fp32, as bf16 and as fp16

A network is often held wider or narrower than its file. So a tensor in a file is the marked one when its values, as
they are, are the marked ones in its dtype, or when they are the marked ones once in the dtype that was marked.
Rounding is to nearest, ties to even, as everywhere. fp64 counts as fp32.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from peta_fast.buffers import Buffer
from peta_fast.errors import CheckpointError

RUNS, RUN = 16, 64
DTYPES = ("F32", "BF16", "F16")
METADATA = "weights"
"""Under which marks by tensor name, as JSON, stand in a file's metadata."""


def runs_of(size: int) -> list[tuple[int, int]]:
    """[start, stop) of the runs of a tensor."""
    if size <= RUNS * RUN:
        return [(0, size)] if size else []
    return [(start, start + RUN) for start in (i * (size - RUN) // (RUNS - 1) for i in range(RUNS))]


def marked(dtype: str) -> bool:
    """Whether tensors of a dtype can be told apart."""
    return dtype in (*DTYPES, "F64")


def mark_of(values: np.ndarray, dtype: str) -> str:
    """values: the runs, fp32, one after another; dtype: that of the tensor."""
    return " ".join([_narrow(dtype), *(_digest(values, d) for d in DTYPES)])


def is_marked(mark: str, values: np.ndarray, dtype: str) -> bool:
    """Whether the runs of a tensor of `dtype` are those of the mark. Raises CheckpointError for what is no mark."""
    held, *digests = mark.split(" ")
    if held not in DTYPES or len(digests) != len(DTYPES):
        raise CheckpointError("metadata 'weights'", f"expected a dtype and three digests, got {mark!r}")
    known = dict(zip(DTYPES, digests, strict=True))
    dtype = _narrow(dtype)
    return _digest(values, dtype) == known[dtype] or _digest(values, held) == known[held]


def marks_in(metadata: Mapping[str, str], who: str) -> dict[str, str]:
    """Marks by tensor name, {} where there are none. Raises CheckpointError when they cannot be read."""
    text = metadata.get(METADATA, "{}")
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(mark, str) for mark in found.values()):
        raise CheckpointError(who, "metadata 'weights' must map names to marks as JSON", "Collect it again.")
    return found


def sample(source: Any, name: str, size: int, read=Buffer.as_bytes) -> np.ndarray:
    """The runs of a tensor of a source, as fp32. read: a Buffer -> its bytes."""
    parts = [_as_floats(read(source.buffer(name, *run)), source.tensors[name].dtype) for run in runs_of(size)]
    return np.concatenate(parts) if parts else np.empty(0, np.float32)


def _as_floats(raw: memoryview, dtype: str) -> np.ndarray:
    if dtype == "BF16":
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(raw, {"F64": "<f8", "F32": "<f4", "F16": "<f2"}[dtype]).astype(np.float32)


def _narrow(dtype: str) -> str:
    return "F32" if dtype == "F64" else dtype


def _digest(values: np.ndarray, dtype: str) -> str:
    values = np.ascontiguousarray(values, np.float32)
    if dtype == "BF16":
        bits = values.view(np.uint32)
        values = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    elif dtype == "F16":
        with np.errstate(over="ignore"):
            values = values.astype(np.float16)
    return hashlib.blake2b(values.tobytes(), digest_size=8).hexdigest()
