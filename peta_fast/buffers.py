"""Dtype names and raw memory runs: the currency between files, native code and tensors. Needs numpy alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

ITEMSIZE = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Bytes an element, by the names that safetensors headers use."""

MERGEABLE = ("F32", "F16", "BF16")
"""Dtypes the native operations compute with; the position is the code that they take."""

LONG_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu", "C64": "complex64",
}  # fmt: skip
"""safetensors dtype name -> the name torch and recipes use."""

SHORT_NAMES = {long: short for short, long in LONG_NAMES.items()}
"""The reverse of LONG_NAMES."""


def is_floating(dtype: str) -> bool:
    return dtype in ("F64", "F32", "F16", "BF16") or dtype.startswith("F8_")


@dataclass(frozen=True, slots=True)
class Buffer:
    """A contiguous run of elements in memory.

    address  of the first element, as an integer; 0 only when size is 0
    dtype    a key of ITEMSIZE
    size     number of elements
    owner    whatever must stay alive while the address is used
    device   whose memory it is: "" for the host's, or "cuda:0"
    """

    address: int
    dtype: str
    size: int
    owner: Any = field(default=None, repr=False, compare=False)
    device: str = ""

    @property
    def nbytes(self) -> int:
        return self.size * ITEMSIZE[self.dtype]

    def slice(self, start: int, stop: int) -> Buffer:
        """Elements [start, stop), without a copy."""
        if not 0 <= start <= stop <= self.size:
            raise IndexError(f"[{start}, {stop}) is outside a buffer of {self.size} elements")
        return Buffer(self.address + start * ITEMSIZE[self.dtype], self.dtype, stop - start, self.owner, self.device)

    def as_bytes(self) -> memoryview:
        """The raw bytes, without a copy."""
        if self.nbytes == 0:
            return memoryview(b"")
        interface = {"data": (self.address, False), "shape": (self.nbytes,), "typestr": "|u1", "version": 3}
        holder = type("BufferBytes", (), {"__array_interface__": interface, "owner": self.owner})()
        return memoryview(np.asarray(holder))

    @classmethod
    def from_array(cls, array: np.ndarray, dtype: str) -> Buffer:
        """A C-contiguous numpy array whose bytes hold `dtype` elements (bf16 comes as uint16)."""
        if not array.flags.c_contiguous:
            raise ValueError(f"array of shape {array.shape} is not contiguous")
        address = array.__array_interface__["data"][0]
        return cls(address, dtype, array.nbytes // ITEMSIZE[dtype], array)
