"""Scores of merges: over the coefficient, and over the number of tasks that are merged.

    normalized score of a task = score of the merge / score of the task's own fine-tune

The curve over the number of tasks merges every subset and averages over all T tasks, also those that were not merged.
Source: Tang et al., ICLR 2024, arXiv:2310.04742, section 4 and figure 5.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from peta_fast.analysis import plots
from peta_fast.analysis.coefficients import choose_addition
from peta_fast.analysis.figures import Figure
from peta_fast.analysis.merges import Evaluate, Merges, checked_scores, grid_of
from peta_fast.errors import RecipeError

DEFAULT = tuple(np.linspace(0, 1, 21))
METHODS = {"task_arithmetic": {"weight": DEFAULT}, "average": {"weight": "1/T"}}
MOST_MERGES = 4096
"""Merges that score_curves makes without being told that so many are meant."""


@dataclass(frozen=True)
class LambdaCurves:
    """scores [n, tasks] of base + l sum_t tau_t."""

    names: tuple[str, ...]
    coefficients: np.ndarray
    tasks: tuple[str, ...]
    scores: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """[n]"""
        return self.scores.mean(1)

    @property
    def best(self) -> float:
        """The coefficient of the highest mean; the smallest of equals."""
        return choose_addition(zip(self.coefficients, self.mean, strict=True))

    def figures(self) -> list[Figure]:
        x = self.coefficients
        lines = {task: self.scores[:, t] for t, task in enumerate(self.tasks)}
        lines |= {"mean": self.mean} if len(self.tasks) > 1 else {}
        return [
            Figure(
                "lambda",
                "Scores over the coefficient",
                f"Base + l times the sum of {len(self.names)} task vectors. Highest mean at l = {self.best:g}.",
                ("coefficient", *self.tasks, "mean"),
                [(c, *row, row.mean()) for c, row in zip(x, self.scores, strict=True)],
                lambda figure: plots.curves(figure, x, lines, xlabel="coefficient l", ylabel="score"),
            )
        ]


def lambda_curves(
    base: Mapping[str, Any],
    models: Sequence[Mapping[str, Any]],
    evaluate: Evaluate,
    *,
    names: Sequence[str] | None = None,
    coefficients: Sequence[float] | None = None,
    threads: int = 0,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> LambdaCurves:
    """Scores of task arithmetic with one coefficient for all models, 21 in [0, 1] unless they are given.

    evaluate  evaluate(state, parameters) -> score, or {task: score}; `state` is overwritten by the next call
    Raises RecipeError where scores are not finite numbers, or their tasks change.
    """
    merges = Merges(base, models, names=names, threads=threads)
    x, tasks, rows = grid_of(coefficients, DEFAULT), None, []
    for i, value in enumerate(x):
        found = _scored(merges, evaluate, {"method": "task_arithmetic", "weight": float(value)}, tasks or ())
        tasks = tasks or tuple(found)
        rows.append([found[task] for task in tasks])
        tell(i + 1, len(x))
    return LambdaCurves(merges.names, x, tasks, np.array(rows))


@dataclass(frozen=True)
class Merge:
    """One subset by one method at its best parameters; normalized: mean over all tasks."""

    method: str
    chosen: tuple[str, ...]
    parameters: Mapping[str, Any]
    scores: Mapping[str, float]
    normalized: float
    absolute: float


@dataclass(frozen=True)
class ScoreCurves:
    """Every subset's best merge. own: score of each fine-tune on its own task; floor: the base's normalized score."""

    names: tuple[str, ...]
    own: Mapping[str, float]
    floor: float
    merges: tuple[Merge, ...]

    def by_number(self, method: str) -> dict[int, tuple[float, float]]:
        """Number of merged tasks -> mean and standard deviation of the normalized score over the subsets."""
        found: dict[int, list[float]] = {}
        for merge in self.merges:
            if merge.method == method:
                found.setdefault(len(merge.chosen), []).append(merge.normalized)
        return {number: (float(np.mean(v)), float(np.std(v))) for number, v in sorted(found.items())}

    def figures(self) -> list[Figure]:
        methods = list(dict.fromkeys(m.method for m in self.merges))
        curves = {method: self.by_number(method) for method in methods}
        x = sorted({number for curve in curves.values() for number in curve})
        lines = {m: np.array([curve[n][0] for n in x]) for m, curve in curves.items()}
        bands = {m: np.array([curve[n][1] for n in x]) for m, curve in curves.items()}
        rows = [(m, n, *curves[m][n]) for m in methods for n in x]
        every = [
            (m.method, len(m.chosen), " ".join(m.chosen), m.normalized, m.absolute, *(m.scores[t] for t in self.names),
             " ".join(f"{k}={v}" for k, v in m.parameters.items()))
            for m in self.merges
        ]  # fmt: skip
        return [
            Figure(
                "score_curves",
                "Normalized score against the number of tasks merged",
                "Score of the merge over that of each task's own fine-tune, mean over all tasks; lines and bands are "
                f"mean and deviation over the subsets. Each subset has the coefficients that are best for it here. The "
                f"base has {self.floor:.3f}.",
                ("method", "tasks merged", "mean normalized score", "standard deviation"),
                rows,
                lambda figure: plots.curves(
                    figure, x, lines, xlabel="number of tasks merged", ylabel="normalized score", bands=bands
                ),
            ),
            Figure(
                "merges", "Every merge", "Each subset of the tasks by each method, at its best parameters.",
                ("method", "tasks merged", "tasks", "normalized", "absolute", *self.names, "parameters"), every, None,
            ),
        ]  # fmt: skip


def score_curves(
    base: Mapping[str, Any],
    models: Sequence[Mapping[str, Any]],
    evaluate: Evaluate,
    *,
    names: Sequence[str] | None = None,
    methods: Mapping[str, Mapping[str, Any]] | None = None,
    most: int = MOST_MERGES,
    threads: int = 0,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> ScoreCurves:
    """Merges every subset of two models or more, by every method, and keeps the best by mean normalized score.

    evaluate  evaluate(state, parameters) -> {name of a model: score on its task}; the next call overwrites `state`
    methods   label -> parameters of merge_state_dicts, `method` being the label unless it is given; a list of values is
              a grid, "1/T" one over the number of merged models. Task arithmetic (21 weights) and average by default
    most      merges to make at most

    Raises RecipeError for fewer than two models, more merges than `most`, a fine-tune whose own score is not positive.
    """
    merges = Merges(base, models, names=names, threads=threads)
    if len(models) < 2:
        raise RecipeError("score_curves", f"expected two models or more, got {len(models)}")
    names = merges.names
    grids = {label: _grid(label, given) for label, given in (methods or METHODS).items()}
    subsets = [c for k in range(2, len(names) + 1) for c in itertools.combinations(range(len(names)), k)]
    total = len(subsets) * sum(map(len, grids.values()))
    if total > most:
        raise RecipeError("score_curves", f"would make {total:,} merges", f"Give smaller grids, or most={total}.")
    own = {
        name: checked_scores(evaluate(merges.own(t), {"models": [name]}), name, [name])[name]
        for t, name in enumerate(names)
    }
    bad = [name for name, score in own.items() if score <= 0]
    if bad:
        raise RecipeError(
            bad[0], f"its own score is {own[bad[0]]:g}, nothing to normalize by", "Scores must be positive."
        )
    floor = _normalized(checked_scores(evaluate(base, {"models": []}), "base", names), own)
    done, found = itertools.count(1), []
    for chosen in subsets:
        for label, grid in grids.items():
            tried = [_tried(merges, evaluate, label, chosen, one, own, lambda: tell(next(done), total)) for one in grid]
            found.append(max(tried, key=lambda merge: merge.normalized))  # of equals, the first in the grid
    return ScoreCurves(names, own, floor, tuple(found))


def _tried(merges: Merges, evaluate, label: str, chosen, parameters, own, advance) -> Merge:
    filled = {k: 1.0 / len(chosen) if v == "1/T" else v for k, v in parameters.items()}
    found = _scored(merges, evaluate, filled, merges.names, chosen)
    scores = {name: found[name] for name in merges.names}
    advance()
    shown = {k: v for k, v in filled.items() if k != "method"}
    names = tuple(merges.names[t] for t in chosen)
    return Merge(label, names, shown, scores, _normalized(scores, own), float(np.mean(list(scores.values()))))


def _normalized(scores: Mapping[str, float], own: Mapping[str, float]) -> float:
    return float(np.mean([scores[name] / value for name, value in own.items()]))


def _grid(label: str, given: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every combination of the values that are lists."""
    settings = {"method": "task_arithmetic" if label == "average" else label, **given}
    axes = [v if isinstance(v, (list, tuple, np.ndarray)) else [v] for v in settings.values()]
    if not all(len(axis) for axis in axes):
        raise RecipeError(label, "expected one value or more for every parameter, got an empty list")
    return [
        {k: v.item() if hasattr(v, "item") else v for k, v in zip(settings, values, strict=True)}
        for values in itertools.product(*axes)
    ]


def _scored(merges: Merges, evaluate: Evaluate, parameters, tasks: Sequence[str], chosen=None) -> dict[str, float]:
    state = merges.merged(chosen, **parameters)
    names = [merges.names[t] for t in (range(len(merges.names)) if chosen is None else chosen)]
    who = " ".join(f"{k}={v}" for k, v in parameters.items())
    return checked_scores(evaluate(state, {**parameters, "models": names}), f"evaluate({who})", tasks)
