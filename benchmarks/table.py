"""Benchmark results as a Markdown table.

usage: table.py RESULTS.json [MORE.json ...]

Takes what merge_suite.py writes (a list of rows) and what `pytest --benchmark-json` writes (rows in extra_info).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

COLUMNS = ("name", "shape", "ours", "reference", "floor", "reference / ours", "ours / floor", "GB/s", "error",
           "goal", "machine", "commit")  # fmt: skip
NUMBERS = COLUMNS[2:9]
NONE = "-"


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Raises ValueError, naming the file, when it holds neither form."""
    found = json.loads(file.read_text(encoding="utf-8"))
    if isinstance(found, list):
        return found
    if isinstance(found, dict) and "benchmarks" in found:
        return [row_of_benchmark(b) for b in found["benchmarks"]]
    raise ValueError(f"{file}: expected a list of rows or pytest-benchmark's JSON")


def row_of_benchmark(benchmark: Mapping[str, Any]) -> dict[str, Any]:
    """One entry of pytest-benchmark's JSON: its best time, and what the benchmark said in extra_info."""
    return {"name": benchmark["name"], "ours": benchmark["stats"]["min"], **benchmark["extra_info"]}


def markdown(rows: Iterable[Mapping[str, Any]]) -> str:
    lines = [_line(COLUMNS), _line("---:" if c in NUMBERS else "---" for c in COLUMNS)]
    lines += [_line(cells(row)) for row in rows]
    return "\n".join(lines) + "\n"


def _line(words: Iterable[str]) -> str:
    return "| " + " | ".join(word.replace("|", "\\|") for word in words) + " |"


def cells(row: Mapping[str, Any]) -> list[str]:
    """One text for each of COLUMNS."""
    unit = row.get("unit", "s")
    ours, reference, floor = row["ours"], row.get("reference"), row.get("floor")
    return [
        row["name"],
        row.get("shape", ""),
        amount(ours, unit),
        _named(amount(reference, unit), row.get("reference_name")),
        _named(amount(floor, unit), row.get("floor_name")),
        f"{reference / ours:.3g}" if reference and ours else NONE,
        f"{ours / floor:.2f}" if floor else NONE,
        f"{row['gbps']:.1f}" if row.get("gbps") else NONE,
        _error(row.get("error"), row.get("error_unit", "")),
        row.get("goal", ""),
        row.get("machine", ""),
        row.get("commit", ""),
    ]


def amount(value: float | None, unit: str) -> str:
    """1.23 s, 4.56 ms, 789 µs; 123.4 MiB, 1.2 GiB"""
    if value is None:
        return NONE
    steps = (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)) if unit == "bytes" else (("s", 1.0), ("ms", 1e-3))
    name, size = next(((n, s) for n, s in steps if value >= s), ("bytes", 1) if unit == "bytes" else ("µs", 1e-6))
    number = value / size
    return f"{number:.{0 if number >= 100 else 1 if number >= 10 else 2}f} {name}"


def _named(text: str, name: str | None) -> str:
    return f"{text} ({name})" if name and text != NONE else text


def _error(value: float | None, unit: str) -> str:
    return NONE if value is None else f"{value:.3g} {unit}".strip()


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    rows = [row for argument in arguments for row in read_rows(Path(argument))]
    sys.stdout.write(markdown(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
