"""A benchmark row: one JSON object that says what was measured, against what, how near the floor, and how right."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from machine import surroundings

REQUIRED = ("name", "commit", "date", "machine", "device", "versions", "shape", "ours", "reference", "floor", "error")
"""Fields that every row has."""


@dataclass(frozen=True)
class Row:
    """One measurement.

    name       what was done
    shape      on what: sizes, dtypes, number of tasks
    ours       best of the rounds, in `unit`
    reference  the same of the peer or of plain PyTorch, None where there is none to run; its name in reference_name
    floor      the least it could take, measured in the same run; what it is in floor_name
    error      of our result, checked after the timing, in error_unit; None where there is nothing to be wrong
    unit       s or bytes
    goal       what was asked for
    nbytes     bytes that must move, for GB/s; 0 where that is not the measure
    details    medians, all rounds, and whatever else helps to judge the number
    """

    name: str
    shape: str
    ours: float
    reference: float | None = None
    floor: float | None = None
    error: float | None = None
    reference_name: str = ""
    floor_name: str = ""
    error_unit: str = ""
    unit: str = "s"
    goal: str = ""
    nbytes: int = 0
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), **ratios(self.ours, self.reference, self.floor, self.nbytes), **surroundings()}


def ratios(ours: float, reference: float | None, floor: float | None, nbytes: int) -> dict[str, float | None]:
    """times_faster = reference / ours, times_floor = ours / floor, gbps = 1e9 bytes a second."""
    return {
        "times_faster": reference / ours if reference and ours else None,
        "times_floor": ours / floor if floor else None,
        "gbps": nbytes / ours / 1e9 if nbytes and ours else None,
    }


def best_and_median(rounds: Sequence[float]) -> dict[str, Any]:
    return {"best": min(rounds), "median": statistics.median(rounds), "rounds": list(rounds)}


def write_json(rows: Iterable[Row], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps([row.to_json() for row in rows], indent=1) + "\n", encoding="utf-8")
