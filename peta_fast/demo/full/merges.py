"""The nine merges, each by the project's public calls, and where one of them means nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from peta_fast.demo.full.kinds import Space, State, solved_name
from peta_fast.demo.full.settings import TrackSettings
from peta_fast.fit.adamerging import adamerging
from peta_fast.fit.concrete import concrete_task_arithmetic
from peta_fast.fit.statistics import Statistics
from peta_fast.fit.tasks import Task
from peta_fast.merging import merge_state_dicts

FITTED = ("adamerging", "concrete")
SOLVED = ("fisher", "regmean", "mats")
SCALED = ("task_arithmetic", "ties", "dare")
METHODS = {
    "average": "average",
    "task_arithmetic": "task arithmetic",
    "ties": "TIES",
    "dare": "DARE",
    "fisher": "Fisher",
    "regmean": "RegMean",
    "mats": "MaTS",
    "adamerging": "AdaMerging",
    "concrete": "Concrete",
}
"""Name -> how tables and pictures call it. Fitted ones start from task arithmetic's lambda, so they come after it."""


def grid(method: str, settings: TrackSettings) -> tuple[float, ...]:
    """What validation picks from."""
    if method in SCALED:
        return settings.scalings
    return settings.mats_iterations if method == "mats" else ()


LEFT_OUT = {
    ("regmean", "linear_model"): "no layer of a tangent model has inputs of its own: tangents depend on all steps",
    ("mats", "linear_model"): "its Kronecker factors are made of layers' own inputs, as RegMean's Gram matrices",
}
"""(method, kind) -> why there is no number."""


@dataclass(frozen=True)
class Chosen:
    """The fine-tunes of some tasks, ready to be merged."""

    space: Space
    tasks: tuple[str, ...]
    states: Sequence[Mapping[str, Tensor]]
    seed: int

    def merged(self, method: str, value: float | None, statistics: Sequence[Statistics] = ()) -> State:
        """The merge in the space of the kind. value: lambda, where fitted methods start; the iterations of MaTS."""
        if method in FITTED:
            return self._fitted(method, value)
        if method in SOLVED:
            return self._solved(method, value, statistics)
        base = None if method == "average" else self.space.origin
        return merge_state_dicts(base, self.states, threads=1, **self._elementwise(method, value))

    def _elementwise(self, method: str, scaling: float | None) -> dict[str, Any]:
        density = self.space.track.settings.density
        return {
            "average": {"method": "linear", "weight": 1.0},
            "task_arithmetic": {"method": "task_arithmetic", "weight": scaling},
            "ties": {"method": "ties", "weight": 1.0, "density": density, "scaling": scaling},
            "dare": {"method": "dare_linear", "weight": scaling, "density": density, "seed": self.seed},
        }[method]

    def _solved(self, method: str, iterations: int | None, statistics: Sequence[Statistics]) -> State:
        own: dict[str, Any] = {"check_statistics": False}  # they are of the networks, which steps alone are not
        if method == "mats":  # as in the paper, where too few iterations to converge are part of the method
            own |= {"operator": "kfac", "preconditioner": "none", "tolerance": 0.0, "iterations": iterations}
        renamed = [{solved_name(name): tensor for name, tensor in state.items()} for state in self.states]
        found = merge_state_dicts(None, renamed, method=method, statistics=statistics, threads=1, **own)
        return {name: found[solved_name(name)] for name in self.space.origin}

    def _fitted(self, method: str, scaling: float | None) -> State:
        space, track, settings = self.space, self.space.track, self.space.track.settings
        space.put(space.origin)
        tasks = [
            Task(task, track.batches(task, "validation", settings.fit_batch), track.logits(task)) for task in self.tasks
        ]
        models, steps = [space.whole(state) for state in self.states], settings.fit_steps
        if method == "adamerging":
            adamerging(space.model, models, tasks, initial=scaling, steps=steps, learning_rate=settings.adamerging_rate)
        else:
            concrete_task_arithmetic(
                space.model, models, tasks, scaling=scaling, steps=steps, learning_rate=settings.concrete_rate,
                seed=self.seed,
            )  # fmt: skip
        return space.current()
