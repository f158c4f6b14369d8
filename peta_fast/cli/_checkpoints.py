"""Checkpoints as the commands read them: opened by path or hub id, walked tile by tile, as numbers of any dtype."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from peta_fast.buffers import Buffer
from peta_fast.formats import Checkpoint, open_checkpoint
from peta_fast.formats.hub import locate

TILE = 1 << 18
"""Elements looked at in one step: it bounds the memory, and its arrays fit into a processor's cache."""

_NUMPY = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "C64": "<c8", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?",
}  # fmt: skip
_SMALL_FLOATS = {"F8_E4M3": (4, 3), "F8_E5M2": (5, 2)}
"""dtype -> (bits of the exponent, bits of the mantissa)"""


def open_model(reference: str) -> Checkpoint:
    """A local path, or a hub id with an optional revision: org/name@revision. Raises CheckpointError."""
    if Path(reference).expanduser().exists():
        return open_checkpoint(locate(reference))
    name, _, revision = reference.partition("@")
    return open_checkpoint(locate(name, revision or None))


def tiles(size: int) -> Iterator[tuple[int, int]]:
    """[start, stop) of consecutive tiles that cover `size` elements."""
    for start in range(0, size, TILE):
        yield start, min(start + TILE, size)


def raw_bytes(buffer: Buffer) -> np.ndarray:
    """[nbytes] uint8, without a copy."""
    return np.frombuffer(buffer.as_bytes(), np.uint8) if buffer.size else np.empty(0, np.uint8)


def values(buffer: Buffer) -> np.ndarray:
    """[size] the elements as numpy numbers: bf16 and 8-bit floats as fp32, all others as they are."""
    raw = raw_bytes(buffer)
    if buffer.dtype == "BF16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    if buffer.dtype in _NUMPY:
        return raw.view(_NUMPY[buffer.dtype])
    return _table_of(buffer.dtype)[raw]


@functools.cache
def _table_of(dtype: str) -> np.ndarray:
    """[256] fp32, the value of each code. Source: https://arxiv.org/abs/2209.05433, OCP Microscaling Formats 1.0."""
    codes = np.arange(256)
    if dtype == "F8_E8M0":
        powers = np.ldexp(np.float64(1), codes - 127)
        return np.where(codes == 255, np.nan, powers).astype(np.float32)
    exponent_bits, mantissa_bits = _SMALL_FLOATS[dtype]
    exponent = (codes & 127) >> mantissa_bits
    mantissa = codes & ((1 << mantissa_bits) - 1)
    bias = (1 << (exponent_bits - 1)) - 1
    significand = np.where(exponent > 0, mantissa + (1 << mantissa_bits), mantissa).astype(np.float64)
    magnitude = np.ldexp(significand, np.maximum(exponent, 1) - bias - mantissa_bits)
    if dtype == "F8_E4M3":
        magnitude[(codes & 127) == 127] = np.nan
    else:
        magnitude[exponent == 31] = np.where(mantissa[exponent == 31] == 0, np.inf, np.nan)
    return np.where(codes & 128, -magnitude, magnitude).astype(np.float32)
