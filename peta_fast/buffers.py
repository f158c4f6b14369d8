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


FACTORS = np.dtype(
    [("left", "u8"), ("right", "u8"), ("origin", "u8"), ("columns", "i8"), ("first", "i8"), ("rank", "i4"),
     ("origin_dtype", "i4")], align=True
)  # fmt: skip
"""csrc/low_rank/low_rank.h: a tensor that is formed from low-rank factors when its elements are wanted."""
PANEL = 64
"""Columns of the right factor that lie together."""


def empty_panels(rank: int, columns: int) -> np.ndarray:
    """[panels, rank, PANEL] fp32 for a right factor of so many columns; zeros past the last one."""
    panels = np.empty((-(-columns // PANEL), rank, PANEL), np.float32)
    panels[columns // PANEL :] = 0
    return panels


def put_in_panels(panels: np.ndarray, ranks: slice, right: np.ndarray) -> None:
    """Rows `ranks` of the right factor are those of `right` [r, columns]."""
    whole = right.shape[1] // PANEL
    panels[:whole, ranks] = right[:, : whole * PANEL].reshape(len(right), whole, PANEL).swapaxes(0, 1)
    if right.shape[1] % PANEL:
        panels[whole, ranks, : right.shape[1] % PANEL] = right[:, whole * PANEL :]


@dataclass(frozen=True, slots=True)
class FactorsBuffer(Buffer):
    """Elements of `origin + left right`, or of `left right`, which native code forms tile by tile and nobody keeps.

    address  of a FACTORS record
    dtype    "FACTORS"; every element is fp32 once it is formed
    record   numpy array with that one record
    """

    record: Any = field(default=None, repr=False, compare=False)

    @property
    def nbytes(self) -> int:
        """Of the elements once they are formed."""
        return 4 * self.size

    @property
    def is_delta(self) -> bool:
        """Whether it is a change, and no whole tensor."""
        return not self.record["origin"][0]

    def slice(self, start: int, stop: int) -> FactorsBuffer:
        if not 0 <= start <= stop <= self.size:
            raise IndexError(f"[{start}, {stop}) is outside a buffer of {self.size} elements")
        record = self.record.copy()
        record["first"] += start
        return _factors_buffer(record, stop - start, self.owner)

    def as_bytes(self) -> memoryview:
        raise TypeError("low-rank factors have no bytes of their own: form them with ops.low_rank.form")

    @classmethod
    def of(cls, left: np.ndarray, right: np.ndarray, origin: Buffer | None = None) -> FactorsBuffer:
        """left [rows, rank], right [rank, columns]: contiguous fp32; origin: a buffer of rows * columns elements."""
        if right.dtype != np.float32 or not right.flags.c_contiguous:
            raise ValueError(f"factors {left.shape} and {right.shape} do not make the tensor")
        panels = empty_panels(*right.shape)
        put_in_panels(panels, slice(None), right)
        return cls.of_panels(left, panels, right.shape[1], origin)

    @classmethod
    def of_panels(cls, left: np.ndarray, panels: np.ndarray, columns: int, origin: Buffer | None = None):
        """left as above; panels of the right factor, filled by `put_in_panels`."""
        wrong = [a for a in (left, panels) if a.dtype != np.float32 or not a.flags.c_contiguous]
        size, expected = left.shape[0] * columns, (-(-columns // PANEL), left.shape[1], PANEL)
        if wrong or panels.shape != expected or (origin is not None and origin.size != size):
            raise ValueError(f"factors {left.shape} and {panels.shape} in panels do not make the tensor")
        record = np.zeros(1, FACTORS)
        record["left"], record["right"] = (a.__array_interface__["data"][0] for a in (left, panels))
        record["columns"], record["rank"] = columns, left.shape[1]
        if origin is not None:
            record["origin"], record["origin_dtype"] = origin.address, MERGEABLE.index(origin.dtype)
        return _factors_buffer(record, size, (left, panels, origin))


def _factors_buffer(record: np.ndarray, size: int, owner: Any) -> FactorsBuffer:
    return FactorsBuffer(record.__array_interface__["data"][0], "FACTORS", size, (record, owner), record=record)
