"""Numbers of all stages in one document, and what follows from them: scores by kind, method, number of tasks.

normalized score of a task = accuracy of the merge / accuracy of the task's own fine-tune of the same kind
"""

from __future__ import annotations

import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from peta_fast.demo.full.chain import Chain, tasks_of
from peta_fast.demo.full.kinds import KINDS
from peta_fast.demo.full.settings import Regime


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation over the seeds; 0 for one seed."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


@dataclass(frozen=True)
class TrackResult:
    """One track: what its stages hold, a list over the seeds.

    base      numbers of the base
    finetunes kind -> seed -> task -> numbers
    merges    kind -> method -> seed -> rows, one a subset of the tasks
    vectors   kind -> seed -> cosines and norms of task vectors
    seconds   of work in all its stages, statistics included, on one thread
    """

    name: str
    tasks: tuple[str, ...]
    base: list[dict[str, Any]]
    finetunes: Mapping[str, list[dict[str, dict]]]
    merges: Mapping[str, Mapping[str, list[list[dict]]]]
    vectors: Mapping[str, list[dict]]
    seconds: float

    @property
    def seeds(self) -> range:
        return range(len(self.base))

    def own(self, kind: str, seed: int) -> dict[str, float]:
        """Task -> test accuracy of its own fine-tune."""
        return {task: numbers["test"][task] for task, numbers in self.finetunes[kind][seed].items()}

    def own_mean(self, kind: str) -> list[float]:
        return [statistics.fmean(self.own(kind, seed).values()) for seed in self.seeds]

    def _score(self, scores: Mapping[str, float], kind: str, seed: int, tasks: Sequence[str]) -> float:
        own = self.own(kind, seed)
        return statistics.fmean(scores[t] / own[t] for t in tasks)

    def rows(self, kind: str, method: str, seed: int, count: int) -> list[dict]:
        return [row for row in self.merges[kind][method][seed] if len(row["tasks"]) == count]

    def counts(self) -> list[int]:
        some = next(iter(next(iter(self.merges.values())).values()))[0]
        return sorted({len(row["tasks"]) for row in some})

    def normalized(self, kind: str, method: str) -> list[float]:
        """A seed: mean over all tasks, all of them merged."""
        return self.by_number(kind, method, len(self.tasks))

    def absolute(self, kind: str, method: str) -> list[float]:
        last = [self.rows(kind, method, seed, len(self.tasks))[0] for seed in self.seeds]
        return [statistics.fmean(row["test"].values()) for row in last]

    def by_number(self, kind: str, method: str, count: int) -> list[float]:
        """A seed: mean over the subsets of that many tasks; all tasks count, merged or not. 1: the fine-tunes."""
        found = []
        for seed in self.seeds:
            if count == 1:
                rows = list(self.finetunes[kind][seed].values())
            else:
                rows = self.rows(kind, method, seed, count)
            found.append(statistics.fmean(self._score(row["test"], kind, seed, self.tasks) for row in rows))
        return found

    def pairs(self, kind: str, method: str) -> list[float]:
        """A seed: mean over the pairs of the normalized score of the two that were merged."""
        return [
            statistics.fmean(self._score(r["test"], kind, s, r["tasks"]) for r in self.rows(kind, method, s, 2))
            for s in self.seeds
        ]

    def pairs_absolute(self, kind: str, method: str) -> list[float]:
        return [
            statistics.fmean(r["test"][t] for r in self.rows(kind, method, s, 2) for t in r["tasks"])
            for s in self.seeds
        ]

    def pair(self, kind: str, method: str, first: str, second: str) -> float:
        """Mean over the seeds of one pair's normalized score."""
        rows = ((s, r) for s in self.seeds for r in self.rows(kind, method, s, 2) if {*r["tasks"]} == {first, second})
        return statistics.fmean(self._score(r["test"], kind, s, r["tasks"]) for s, r in rows)

    def base_normalized(self, kind: str) -> list[float]:
        return [self._score(self.base[s]["test"], kind, s, self.tasks) for s in self.seeds]

    def base_absolute(self) -> list[float]:
        return [statistics.fmean(numbers["test"].values()) for numbers in self.base]

    def mean_cosine(self, kind: str) -> list[float]:
        """A seed: mean |cosine| of two tasks' vectors."""
        places = [(i, j) for i in range(len(self.tasks)) for j in range(i)]
        return [statistics.fmean(abs(v["cosine"][i][j]) for i, j in places) for v in self.vectors[kind]]

    def curve(self, kind: str, method: str) -> dict[float, float]:
        """lambda -> mean over the seeds of the normalized validation score, all tasks merged."""
        rows = [self.rows(kind, method, seed, len(self.tasks))[0]["candidates"] for seed in self.seeds]
        return {float(s): statistics.fmean(row[s] for row in rows) for s in rows[0]}


def collect(out: Path, regime: Regime, seeds: Sequence[int], track: str) -> TrackResult:
    """Reads the stages of a track; all of them must be there."""

    def chain(seed: int, kind: str) -> Chain:
        return Chain(out, regime, seed, track, kind, lambda *stage: None)

    tasks = tasks_of(track)
    finetunes: dict[str, list] = {}
    merges: dict[str, dict[str, list]] = {}
    vectors: dict[str, list] = {}
    for kind in KINDS:
        chains = [chain(seed, kind) for seed in seeds]
        finetunes[kind] = [{task: c.finetune_stage(task).numbers() for task in tasks} for c in chains]
        merges[kind] = {
            m: [c.merge_stage(m).numbers()["subsets"] for c in chains] for m in chains[0].methods()
        }  # fmt: skip
        vectors[kind] = [c.vectors_stage().numbers() for c in chains]
    base = [chain(seed, next(iter(KINDS))).base_stage.numbers() for seed in seeds]
    every = [stage for kind in KINDS for seed in seeds for stage in chain(seed, kind).stages()]
    seconds = sum(numbers["seconds"] for numbers in [*base, *(stage.numbers() for stage in every)])
    return TrackResult(track, tasks, base, finetunes, merges, vectors, seconds)


def machine() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": processor(),
        "cores": available_cores(),
    }


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


def available_cores() -> int:
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
