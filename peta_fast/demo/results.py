"""What a demonstration has found: one row for each checkpoint, and the numbers derived from the rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from peta_fast.demo.adapters import AdapterResult

BASE, FINETUNE, MERGE = "base", "finetune", "merge"
"""Kinds of rows."""


@dataclass(frozen=True)
class Row:
    """One checkpoint on the test split.

    name        "base", the task of a fine-tune, or the method of a merge
    kind        BASE, FINETUNE or MERGE
    checkpoint  its folder
    accuracy    domain -> fraction of the test images recognized, in [0, 1]
    recipe      of a merge
    scaling     chosen on validation; None where nothing is scaled
    validated   mean accuracy over the tasks on the validation split, of a merge
    candidates  scaling -> the same of every scaling that was tried
    """

    name: str
    kind: str
    checkpoint: Path
    accuracy: Mapping[str, float]
    recipe: Path | None = None
    scaling: float | None = None
    validated: float | None = None
    candidates: Mapping[float, float] = field(default_factory=dict)


@dataclass(frozen=True)
class DemoResult:
    """Rows in the order of the table: the base, the fine-tunes, the merges."""

    out: Path
    seed: int
    quick: bool
    tasks: tuple[str, ...]
    rows: tuple[Row, ...]
    seconds: float
    adapters: AdapterResult | None = None

    def row(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)

    def of_kind(self, kind: str) -> list[Row]:
        return [row for row in self.rows if row.kind == kind]

    def mean(self, row: Row) -> float:
        """Mean accuracy over the tasks."""
        return sum(row.accuracy[task] for task in self.tasks) / len(self.tasks)

    def own(self, task: str) -> float:
        """Accuracy of the task's own fine-tune on it: what a merge is measured against."""
        return self.row(task).accuracy[task]

    def own_mean(self) -> float:
        return sum(self.own(task) for task in self.tasks) / len(self.tasks)

    def normalized(self, row: Row) -> float:
        """Mean over the tasks of accuracy / accuracy of the task's own fine-tune."""
        return sum(row.accuracy[task] / self.own(task) for task in self.tasks) / len(self.tasks)

    @property
    def best(self) -> Row:
        """The merge that validation would pick, so that no choice rests on the test images."""
        return max(self.of_kind(MERGE), key=lambda row: row.validated or 0.0)
