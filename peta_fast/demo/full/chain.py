"""The stages of one seed, track and kind, in their order; each is done once and found again by its file.

    base (digits) -> a fine-tune a task -> statistics a task -> task vectors -> a merge method each, with all subsets

Weights see the training examples; lambda is chosen on validation, where the fits see their unlabelled inputs, too;
every score reported is of the test examples.
"""

from __future__ import annotations

import itertools
import statistics as stats
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peta_fast.analysis import measure_state_dicts
from peta_fast.demo.full.kinds import Space, space_of, statistics_of, trainable, trained_state
from peta_fast.demo.full.merges import FITTED, LEFT_OUT, METHODS, SCALED, SOLVED, Chosen, grid
from peta_fast.demo.full.settings import DIGITS, Regime
from peta_fast.demo.full.stages import Stage, fingerprint
from peta_fast.demo.full.tracks import Track, track_of, train, trained_base
from peta_fast.fit.statistics import Statistics

FORMAT = 1
"""Counts up when a stage computes something else from the same settings."""
START, BASE, FINETUNE, STATISTICS, VECTORS = "start", "base", "finetune", "statistics", "vectors"
SECONDS = "seconds"
"""Of the processor in a stage, among its numbers: one thread's, so on an idle machine the time it took."""
Result = tuple[dict[str, Tensor] | None, dict[str, Any]]
"""What a stage leaves: tensors, if any, and numbers."""
Tell = Callable[[str, float, str], None]
"""tell(name of a stage, seconds it took or 0 where it was there, outcome)"""


@dataclass
class Chain:
    """One seed, track and kind. BASE as the kind: what all kinds of the track share."""

    out: Path
    regime: Regime
    seed: int
    track_name: str
    kind: str
    tell: Tell

    @property
    def settings(self):
        return self.regime.tracks[self.track_name]

    def _stage(self, name: str, *depends: Any) -> Stage:
        folder = self.out / "stages" / f"seed{self.seed}" / self.track_name / self.kind
        return Stage(folder / f"{name}-{fingerprint(FORMAT, self.seed, self.track_name, self.kind, name, *depends)}")

    @property
    def base_stage(self) -> Stage:
        s = self.settings
        depends = [
            s.train,
            s.validation,
            s.test,
            s.batch,
            s.frozen_layers,
            s.base_epochs,
            s.base_rate,
            s.few_per_digit,
            versions(),
        ]
        folder = self.out / "stages" / f"seed{self.seed}" / self.track_name
        return Stage(folder / f"{BASE}-{fingerprint(FORMAT, self.seed, self.track_name, BASE, *depends)}")

    @cached_property
    def track(self) -> Track:
        weights = self.base_stage.tensors() if self.track_name == DIGITS else None
        return track_of(self.track_name, self.settings, self.seed, weights)

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        return tasks_of(self.track_name)

    @cached_property
    def space(self) -> Space:
        return space_of(self.kind, self.track, self.seed)

    def finetune_stage(self, task: str) -> Stage:
        s, how = self.settings, self.settings.training[self.kind]
        adapter = [s.rank, s.alpha, *s.targets] if self.kind not in ("full", "attention") else []
        return self._stage(f"{FINETUNE}-{task}", self.base_stage.mark, how.epochs, how.learning_rate, *adapter)

    def statistics_stage(self, task: str) -> Stage:
        return self._stage(f"{STATISTICS}-{task}", self.finetune_stage(task).mark, self.settings.statistics)

    def vectors_stage(self) -> Stage:
        return self._stage(VECTORS, *self._finetunes())

    def merge_stage(self, method: str) -> Stage:
        s = self.settings
        own: list[Any] = [s.triples, s.density]
        if method in SCALED or method in FITTED:
            own += s.scalings
        if method in SOLVED:
            own += [s.statistics, *grid(method, s)]
        if method in FITTED:
            own += [s.fit_steps, s.fit_batch, {"adamerging": s.adamerging_rate}.get(method, s.concrete_rate)]
        return self._stage(method, *self._finetunes(), *own)

    def _finetunes(self) -> list[str]:
        return [self.finetune_stage(task).mark for task in self.tasks]

    def methods(self) -> list[str]:
        return [method for method in METHODS if (method, self.kind) not in LEFT_OUT]

    def subsets(self) -> list[tuple[str, ...]]:
        """Pairs, all, and what is between where that is wanted."""
        counts = {2, len(self.tasks), *(range(2, len(self.tasks)) if self.settings.triples else ())}
        return [chosen for count in sorted(counts) for chosen in itertools.combinations(self.tasks, count)]

    def run_base(self) -> None:
        """What all kinds need: the base, and its scores."""
        self._do(BASE, self.base_stage, self._base)

    def _base(self) -> Result:
        track = track_of(self.track_name, self.settings, self.seed)
        weights = trained_base(track, self.seed) if self.track_name == DIGITS else {}
        if weights:
            track.base.load_state_dict(weights)
        counts = {t: {n: track.count(t, n) for n in ("train", "validation", "test")} for t in track.tasks}
        return weights, {
            "test": track.accuracies(track.base, "test"), "counts": counts,
            "frozen_layers": self.settings.frozen_layers,
        }  # fmt: skip

    def stages(self) -> list[Stage]:
        """Those whose files stay, in the order of their names; statistics go when the merges they serve are there."""
        return [
            *(self.finetune_stage(task) for task in self.tasks), self.vectors_stage(),
            *(self.merge_stage(method) for method in self.methods()),
        ]  # fmt: skip

    def count(self) -> int:
        """Stages that `run` tells of."""
        solved = all(self.merge_stage(m).done() for m in self.methods() if m in SOLVED)
        return len(self.stages()) + (0 if solved else len(self.tasks))

    def run(self) -> None:
        """All stages of this kind that are not there yet."""
        for task in self.tasks:
            self._do(f"{FINETUNE} {task}", self.finetune_stage(task), lambda t=task: self._finetune(t))
        solved = [m for m in self.methods() if m in SOLVED]
        if not all(self.merge_stage(m).done() for m in solved):
            for task in self.tasks:
                stage = self.statistics_stage(task)
                self._do(f"{STATISTICS} {task}", stage, lambda t=task: self._statistics(t))
        self._do("task vectors", self.vectors_stage(), self._vectors)
        for method in [*solved, *(m for m in self.methods() if m not in SOLVED)]:
            self._do(method, self.merge_stage(method), lambda m=method: self._merge(m))
            if method == solved[-1]:
                self._forget_statistics()

    def _do(self, name: str, stage: Stage, work: Callable[[], Result]) -> None:
        started, busy, found = time.perf_counter(), time.process_time(), stage.done()
        if not found:
            tensors, numbers = work()
            stage.write({**numbers, SECONDS: time.process_time() - busy}, tensors)
        self.tell(name, 0.0 if found else time.perf_counter() - started, self._outcome(stage))

    def _outcome(self, stage: Stage) -> str:
        numbers = stage.numbers()
        if "subsets" in numbers:
            return f"{stats.fmean(numbers['subsets'][-1]['test'].values()):.1%} with all merged"
        if "task" in numbers:
            return f"{numbers['test'][numbers['task']]:.1%} on its task"
        return f"{stats.fmean(numbers['test'].values()):.1%}, mean over the tasks" if "test" in numbers else ""

    def _forget_statistics(self) -> None:
        """They are large, and nothing needs them again."""
        for task in self.tasks:
            self.statistics_stage(task).remove()

    def _finetune(self, task: str) -> Result:
        how, started = self.settings.training[self.kind], time.process_time()
        model = trainable(self.kind, self.track, self.seed)
        train(model, self.track, task, epochs=how.epochs, learning_rate=how.learning_rate, seed=self.seed)
        seconds = time.process_time() - started
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        state = trained_state(self.kind, model)
        model = self.space.put({**self.space.origin, **state})
        validation = self.track.accuracy(model, task, "validation")
        numbers = {"task": task, "validation": validation, "test": self.track.accuracies(model, "test")}
        return state, numbers | {"training_seconds": seconds, "trained": trained}

    def _statistics(self, task: str) -> Result:
        return dict(statistics_of(self.space, self.states[task], task)), {}

    @cached_property
    def states(self) -> dict[str, dict[str, Tensor]]:
        return {task: self.finetune_stage(task).tensors() for task in self.tasks}

    def _vectors(self) -> Result:
        """Cosines and norms of the task vectors."""
        found = measure_state_dicts(self.space.origin, list(self.states.values()), names=list(self.tasks))
        return None, {"tasks": self.tasks, "cosine": found.total.cosine.tolist(), "norms": found.total.norms.tolist()}

    def _merge(self, method: str) -> Result:
        wanted = self.tasks if method in SOLVED else ()
        known = {task: Statistics(self.statistics_stage(task).tensors(), {}) for task in wanted}
        subsets = [self._merge_of(method, chosen, [known[t] for t in chosen if known]) for chosen in self.subsets()]
        return None, {"method": method, "subsets": subsets}

    def _merge_of(self, method: str, tasks: Sequence[str], known: Sequence[Statistics]) -> dict[str, Any]:
        chosen = Chosen(self.space, tuple(tasks), [self.states[t] for t in tasks], self.seed)
        values = grid(method, self.settings)
        if method in SCALED and self.kind == "linear_model":
            tried = self._along(chosen, method, values)
            value = best_of(tried)
            merged = chosen.merged(method, value)
        elif values:
            states = {v: chosen.merged(method, v, known) for v in values}
            tried = {v: self._validated(state, tasks) for v, state in states.items()}
            value = best_of(tried)
            merged = states[value]
        else:
            value = self._scaling_of_task_arithmetic(tasks) if method in FITTED else None
            merged = chosen.merged(method, value, known)
            tried = {value: self._validated(merged, tasks)}
        return {
            "tasks": list(tasks), "chosen": value, "candidates": {str(v): tried[v] for v in values},
            "validation": tried[value], "test": self.track.accuracies(self.space.put(merged), "test"),
        }  # fmt: skip

    def _along(self, chosen: Chosen, method: str, values: Sequence[float]) -> dict[float, float]:
        """lambda -> score on validation: a tangent model is linear in it, so that one forward pass serves all."""
        model, own = self.space.put(chosen.merged(method, 1.0)), self._own_validation(chosen.tasks)
        found = {t: self.track.accuracies_along(model, t, "validation", values) for t in chosen.tasks}
        return {v: stats.fmean(found[t][v] / own[t] for t in chosen.tasks) for v in values}

    def _validated(self, state, tasks: Sequence[str]) -> float:
        """Mean accuracy over the merged tasks, relative to each fine-tune's own."""
        own = self._own_validation(tasks)
        found = self.track.accuracies(self.space.put(state), "validation", tasks)
        return stats.fmean(found[t] / own[t] for t in tasks)

    def _own_validation(self, tasks: Sequence[str]) -> dict[str, float]:
        return {task: max(self.finetune_stage(task).numbers()["validation"], 1e-9) for task in tasks}

    def _scaling_of_task_arithmetic(self, tasks: Sequence[str]) -> float:
        rows = self.merge_stage("task_arithmetic").numbers()["subsets"]
        return next(row["chosen"] for row in rows if row["tasks"] == list(tasks))


def best_of(tried: Mapping[float, float]) -> float:
    """The value with the best score; of equals, the first."""
    return max(tried, key=tried.__getitem__)


def tasks_of(track: str) -> tuple[str, ...]:
    from peta_fast.demo.data import TASKS as DOMAINS
    from peta_fast.demo.full.sentences import TASKS as QUESTIONS

    return tuple(DOMAINS if track == DIGITS else QUESTIONS)


def versions() -> list[str]:
    """What results depend on besides settings: the sentences are those of this Python."""
    import platform

    return [".".join(platform.python_version_tuple()[:2]), torch.__version__]
