"""delta_merge on its records, for what no DeltaMerge says: element weights, given signs, ready task vectors, floors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from backends import SIMD, buffer_of, contents, output_of, same_on_every_backend

from peta_fast.buffers import Buffer
from peta_fast.ops import records as r

NONFINITE_INPUT, NONFINITE_RESULT = 1, 2


class Stored(NamedTuple):
    """An array as it lies in memory, and its dtype or mask form."""

    array: np.ndarray
    dtype: str


class Outcome(NamedTuple):
    out: np.ndarray
    nonfinite: int
    sign_total: int


def merge_records(
    module,
    tasks: Sequence[Mapping[str, Any]],
    rule: Mapping[str, Any],
    *,
    size: int,
    base: Stored | None = None,
    sign: Stored | None = None,
    out_dtype: str = "F32",
    start: int = 0,
    threads: int = 1,
    mode: int = r.MERGE,
) -> Outcome:
    """Runs one piece. tasks and rule: fields of records.TASK and RULE; x, mask, weights and probability are Stored."""
    task_table, rule_table, piece = np.zeros(len(tasks), r.TASK), np.zeros(1, r.RULE), np.zeros(1, r.PIECE)
    alive = [fill(t, {"weight": 1.0, "prescale": 1.0, **task}) for t, task in zip(task_table, tasks, strict=True)]
    fill(rule_table[0], {"divisor": 1.0, "scaling": 1.0, **rule})
    out = output_of(size, out_dtype)
    fields = {"out": out.address, "out_dtype": r.CODES[out_dtype], "size": size, "start": start, "tasks": len(tasks)}
    alive.append(fill(piece[0], {**fields, "base": base or 0, "sign": sign or 0}))
    module.delta_merge(mode, piece, task_table, rule_table, threads)
    return Outcome(contents(out), int(piece["nonfinite"][0]), int(piece["sign_total"][0]))


def fill(record: np.void, fields: Mapping[str, Any]) -> list[Buffer]:
    """Sets fields of one record, arrays by address and dtype; returns what must stay alive."""
    alive = []
    for field, value in fields.items():
        if isinstance(value, Stored):
            alive.append(buffer_of(value.array, "U8" if value.dtype in ("BITS", "BYTES") else value.dtype))
            dtype_field = "dtype" if field == "x" else f"{field}_dtype"
            if dtype_field in record.dtype.names:
                record[dtype_field] = r.CODES[value.dtype]
            value = alive[-1].address
        record[field] = value
    return alive


def same_records_on_every_backend(tasks, rule, **keywords) -> Outcome:
    """merge_records with the same bits, flags and totals from every backend; only a merge has flags."""
    outcomes = []

    def run(module, _):
        outcomes.append(merge_records(module, tasks, rule, **keywords))
        return outcomes[-1].out

    same_on_every_backend(run, threads=(1,))
    merging = keywords.get("mode", r.MERGE) == r.MERGE
    found = [(o.nonfinite if merging else 0, o.sign_total) for o in outcomes]
    assert len(set(found)) == 1, f"(nonfinite, sign_total) of plain and {SIMD} differ: {found}"
    return outcomes[0]
