"""The records that native code takes, as numpy layouts of the C structs in csrc, and their codes."""

from __future__ import annotations

import numpy as np

from peta_fast.buffers import MERGEABLE, Buffer, FactorsBuffer

CODES = {name: code for code, name in enumerate(MERGEABLE)} | {"BITS": 3, "BYTES": 4, "FACTORS": 5}
"""csrc/dtype.h. BITS and BYTES are forms of masks: one bit, or one byte, an element. FACTORS: see FactorsBuffer."""

BASE_TENSOR, BASE_ZERO, BASE_ONE = range(3)
KEEP_ALL, KEEP_NONE, KEEP_TOP, KEEP_BAND, KEEP_RANDOM, KEEP_RANDOM_PER_ELEMENT = range(6)
ELECT_NONE, ELECT_WEIGHTED, ELECT_UNWEIGHTED, ELECT_COUNT, ELECT_GIVEN = range(5)
SUM, MAX, LARGEST_FIRST, LARGEST_LAST, MEDIAN = range(5)
DIVIDE_CONSTANT, DIVIDE_AGREEING_WEIGHT, DIVIDE_AGREEING_COUNT = range(3)
MERGE, KEPT_NORM, SIGN_TOTAL = range(3)

ABS_MASK = 0x7FFFFFFF
"""Also a threshold that nothing exceeds."""
LAST = np.iinfo(np.int64).max
BLOCK = 4096
"""Elements of one partial sum."""


def _layout(*fields: tuple[str, str]) -> np.dtype:
    return np.dtype([(name, kind) for name, kind in fields], align=True)


DELTA = _layout(
    ("base", "u8"), ("x", "u8"), ("base_kind", "i4"), ("base_dtype", "i4"), ("dtype", "i4"), ("is_delta", "i4")
)  # fmt: skip
TASK = _layout(
    ("x", "u8"), ("mask", "u8"), ("weights", "u8"), ("probability", "u8"), ("key", "u8"),
    ("low_index", "i8"), ("high_index", "i8"), ("low", "u4"), ("high", "u4"),
    ("weight", "f4"), ("prescale", "f4"), ("p", "f4"),
    ("dtype", "i4"), ("mask_dtype", "i4"), ("weights_dtype", "i4"), ("keep", "i4"), ("is_delta", "i4"),
    ("by_probability", "i4"),
)  # fmt: skip
RULE = _layout(
    ("base_kind", "i4"), ("elect", "i4"), ("zero_sign", "i4"), ("aggregate", "i4"), ("divide", "i4"),
    ("divisor", "f4"), ("floor", "f4"), ("scaling", "f4"),
)  # fmt: skip
PIECE = _layout(
    ("base", "u8"), ("out", "u8"), ("sign", "u8"), ("partials", "u8"), ("size", "i8"), ("start", "i8"),
    ("first_task", "i8"), ("sign_total", "i8"), ("tasks", "i4"), ("rule", "i4"),
    ("base_dtype", "i4"), ("out_dtype", "i4"), ("sign_dtype", "i4"), ("nonfinite", "u4"),
)  # fmt: skip
USE = _layout(("term", "i4"), ("weight", "f4"))
VARIANT = _layout(
    ("out", "u8"), ("first_use", "i8"), ("uses", "i4"), ("rule", "i4"), ("out_dtype", "i4"), ("nonfinite", "u4")
)  # fmt: skip
GROUP = _layout(
    ("base", "u8"), ("size", "i8"), ("start", "i8"), ("first_term", "i8"), ("first_variant", "i8"),
    ("terms", "i4"), ("variants", "i4"), ("base_kind", "i4"), ("base_dtype", "i4"),
)  # fmt: skip
SELECT_TASK = _layout(
    ("delta", DELTA), ("size", "i8"), ("first_query", "i8"), ("group", "i8"), ("queries", "i4"), ("pad", "i4")
)  # fmt: skip
SELECT_QUERY = _layout(
    ("count", "i8"), ("above", "i8"), ("equal", "i8"), ("last_index", "i8"), ("threshold", "u4"), ("pad", "u4")
)  # fmt: skip
MASK_TASK = _layout(("x", "u8"), ("coefficient", "f4"), ("dtype", "i4"))
MASK_TENSOR = _layout(
    ("logits", "u8"), ("base", "u8"), ("out", "u8"), ("g", "u8"), ("product", "u8"), ("gradient", "u8"),
    ("exp_avg", "u8"), ("exp_avg_sq", "u8"), ("key", "u8"), ("size", "i8"), ("first_task", "i8"), ("first_sum", "i8"),
    ("mean", "f8"), ("shift", "f8"), ("tasks", "i4"), ("base_dtype", "i4"), ("out_dtype", "i4"), ("g_dtype", "i4"),
)  # fmt: skip
MASK_SETTINGS = _layout(
    ("temperature", "f8"), ("beta1", "f4"), ("beta2", "f4"), ("rate", "f4"), ("root", "f4"), ("epsilon", "f4"),
    ("pad", "i4"),
)  # fmt: skip


def is_delta(x: Buffer) -> bool:
    """Whether a buffer holds a ready task vector: low-rank factors with nothing to add them to."""
    return isinstance(x, FactorsBuffer) and x.is_delta


def delta_record(base: Buffer | None, x: Buffer, base_kind: int) -> tuple:
    """One DELTA as a tuple, good as long as x is; base may be None unless base_kind is BASE_TENSOR."""
    address, dtype = (base.address, CODES[base.dtype]) if base is not None else (0, 0)
    return (address, x.address, base_kind, dtype, CODES[x.dtype], int(is_delta(x)))


def bits(value: float) -> int:
    """The bits of |value| as fp32: ordered as the magnitudes are."""
    return int(np.float32(abs(value)).view(np.uint32)) & ABS_MASK


def from_bits(value: int) -> float:
    return float(np.uint32(value).view(np.float32))
