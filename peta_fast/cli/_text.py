"""How numbers, tables and JSON look on stdout."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

ROWS = 40
"""Rows of a table unless --limit or --all says otherwise."""


def size_text(count: float) -> str:
    """Bytes as people read them, in powers of ten: 14.5 GB."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB" if count < 1000 else f"{count:,.0f} TB"


def seconds_text(seconds: float) -> str:
    """0.31 s, 42 s, 3 min 20 s, 2 h 5 min"""
    if seconds < 10:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def shape_text(shape: Sequence[int]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def number_text(value: float) -> str:
    return f"{value:.6g}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Iterable[str] = ()) -> str:
    """Lines of aligned columns, two blanks apart; the columns named in `numbers` end at the right."""
    right = [name in set(numbers) for name in head]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        placed = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right, strict=True))
        return "  ".join(placed).rstrip()

    return "\n".join(map(line, [head, *rows]))


def print_table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, limit: int | None, numbers: Iterable[str] = ()
) -> None:
    """The first `limit` rows (None: all), and a line that says how many were left out."""
    shown = rows if limit is None else rows[:limit]
    if shown:
        print(table(head, shown, numbers))
    if len(shown) < len(rows):
        print(f"... {len(rows) - len(shown)} more; --all or --json shows them")


def print_facts(facts: dict[str, str]) -> None:
    """One fact a line, the values aligned."""
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name.ljust(width)}  {value}")


def print_json(value: Any) -> None:
    """Strict JSON: NaN and infinities become the texts "nan", "inf" and "-inf"."""
    print(json.dumps(_strict(value), indent=2, ensure_ascii=False, allow_nan=False))


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _strict(member) for key, member in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(member) for member in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | bool | None) else str(value)
