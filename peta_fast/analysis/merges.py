"""Merged models for evaluation, made one after another in one place, and what an evaluator may return."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from peta_fast.analysis.task_vectors import labels_of
from peta_fast.errors import RecipeError
from peta_fast.merging import merge_state_dicts

Scores = Mapping[str, float]
Evaluate = Callable[[Mapping[str, Any], Mapping[str, Any]], "float | Scores"]
"""evaluate(state, parameters) -> a score, or one a task; higher is better."""


class Merges:
    """All merges of some fine-tunes of one base.

    base, models  state dicts on the CPU, as merge_state_dicts takes them

    A state that `merged` returns is overwritten by the next call: evaluate it, keep nothing of it.
    """

    def __init__(self, base: Mapping[str, Any], models: Sequence[Mapping[str, Any]], *, names=None, threads: int = 0):
        places = [f"model {t}" for t in range(len(models))]
        self.base, self.models, self.names = base, list(models), labels_of(places, names)
        self.threads = threads
        self.place: dict[str, Any] | None = None

    def merged(self, chosen: Sequence[int] | None = None, **parameters: Any) -> Mapping[str, Any]:
        """The merge of the chosen models, all by default; parameters as merge_state_dicts takes them."""
        models = [self.models[t] for t in (range(len(self.models)) if chosen is None else chosen)]
        self.place = merge_state_dicts(self.base, models, out=self.place, threads=self.threads, **parameters)
        return self.place

    def at(self, weights: Sequence[float], chosen: Sequence[int] | None = None) -> Mapping[str, Any]:
        """theta0 + sum_t w_t tau_t"""
        return self.merged(chosen, method="task_arithmetic", weight=[float(w) for w in weights])

    def own(self, task: int) -> Mapping[str, Any]:
        """A fine-tune as it is, the base's tensors where it has none."""
        return {**self.base, **self.models[task]}


def grid_of(coefficients, default: Sequence[float]) -> np.ndarray:
    """[n] fp64, rising. Raises RecipeError."""
    found = np.asarray(default if coefficients is None else coefficients, np.float64)
    if found.ndim != 1 or not len(found) or not np.isfinite(found).all() or not (np.diff(found) > 0).all():
        raise RecipeError("coefficients", f"expected rising numbers, got {np.array2string(found, threshold=8)}")
    return found


def checked_scores(result: float | Scores, who: str, tasks: Sequence[str] = ()) -> dict[str, float]:
    """What an evaluator returned, as finite floats. Raises RecipeError, naming the task, where it is none.

    tasks  that must be among them
    """
    found = dict(result) if isinstance(result, Mapping) else {"score": result}
    missing = [task for task in tasks if task not in found]
    if missing or not found:
        problem = f"expected a score for each of {', '.join(tasks)}, got {', '.join(map(str, found)) or 'none'}"
        raise RecipeError(who, problem, "Return a dict with the models' names as keys.")
    scores = {}
    for task, value in found.items():
        scores[str(task)] = checked_number(value, who, str(task))
    return scores


def checked_number(value: Any, who: str, what: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise RecipeError(who, f"{what}: expected a number, got {value!r}") from None
    if not math.isfinite(number):
        raise RecipeError(who, f"{what}: expected a finite number, got {number}", "Look for NaN in the model's output.")
    return number
