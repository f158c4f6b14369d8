"""A line for every stage, with what is left: how many stages, and how long they will take at the speed so far."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from rich.console import Console

from peta_fast.demo.full.chain import BASE
from peta_fast.demo.full.pool import Unit
from peta_fast.demo.full.settings import DIGITS, TEXT
from peta_fast.demo.progress import say

COSTS = {
    (DIGITS, BASE): 30, (DIGITS, "full"): 65, (DIGITS, "attention"): 50, (DIGITS, "lora"): 55,
    (DIGITS, "linear_layer"): 65, (DIGITS, "linear_model"): 200,
    (TEXT, BASE): 8, (TEXT, "full"): 200, (TEXT, "attention"): 130, (TEXT, "lora"): 110,
    (TEXT, "linear_layer"): 110, (TEXT, "linear_model"): 320,
}  # fmt: skip
"""Seconds of a unit on one core of the machine this was written on: for the estimate, not for any result."""


class Progress:
    """counts: unit -> stages that it tells of. Stages that were there already take no time and do not count for it."""

    def __init__(self, console: Console, units: Sequence[Unit], counts: Mapping[Unit, int], jobs: int):
        self.console, self.counts, self.jobs, self.started = console, counts, jobs, time.perf_counter()
        self.stages, self.told_of = sum(counts.values()), 0
        self.left = sum(self.cost(u.track, u.kind) for u in units)
        self.worked = 0.0

    @staticmethod
    def cost(track: str, kind: str) -> float:
        return COSTS[track, kind]

    def told(self, unit: Unit, stage: str, seconds: float, outcome: str) -> None:
        self.told_of += 1
        share = self.cost(unit.track, unit.kind) / self.counts[unit]
        self.left -= share
        self.worked += share if seconds else 0.0
        took = f"{seconds:.1f} s" if seconds else "was there"
        where = (
            f"seed {unit.seed}, {unit.track}, {unit.kind}: "
            if unit.kind != BASE
            else f"seed {unit.seed}, {unit.track}: "
        )
        say(
            self.console,
            f"[{self.told_of}/{self.stages}] {where}{stage}{', ' if outcome else ''}{outcome} ({took}; {self.eta()})",
        )

    def eta(self) -> str:
        """At the speed so far, which the first units' expected speed is mixed into."""
        elapsed, prior = time.perf_counter() - self.started, 30.0
        speed = (self.worked + prior * self.jobs) / (elapsed + prior)
        return f"about {max(0.0, self.left) / speed / 60:.0f} min left"
