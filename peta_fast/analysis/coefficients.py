"""Which coefficient to merge with: the rules of adding tasks and of unlearning one.

    addition  the highest score; of equals, the smallest coefficient
    negation  theta0 - l tau: the lowest score on the target, of those l that keep the control task at 95 % of the base

Source: Ilharco et al., ICLR 2023, arXiv:2212.04089; Ortiz-Jimenez et al., NeurIPS 2023, arXiv:2305.12827.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from peta_fast.analysis import plots
from peta_fast.analysis.figures import Figure
from peta_fast.analysis.merges import Merges, checked_number, grid_of
from peta_fast.errors import RecipeError

DEFAULT = tuple(np.linspace(0, 1, 21))
CONTROL_THRESHOLD = 0.95


def choose_addition(points: Iterable[tuple[float, float]]) -> float:
    """The coefficient of the highest score among (coefficient, score); the smallest one of equals."""
    found = [(checked_number(c, "points", "coefficient"), checked_number(s, "points", "score")) for c, s in points]
    if not found:
        raise RecipeError("points", "expected one (coefficient, score) or more, got none")
    return min(found, key=lambda point: (-point[1], point[0]))[0]


def choose_negation(
    points: Iterable[tuple[float, float, float]], base_control: float, *, threshold: float = CONTROL_THRESHOLD
) -> float | None:
    """The coefficient of the lowest target score whose control score is at least threshold * base_control.

    points  (coefficient, target score, control score)

    The smallest one of equals; None where no point keeps the control task.
    """
    found = [tuple(checked_number(v, "points", what) for v, what in zip(p, ("coefficient", "target", "control"),
                                                                         strict=True)) for p in points]  # fmt: skip
    kept = [(target, coefficient) for coefficient, target, control in found if control >= threshold * base_control]
    return min(kept)[1] if kept else None


@dataclass(frozen=True)
class Negation:
    """coefficient: the chosen l, 0 where nothing but the base keeps the control task; target, control: [n] scores."""

    coefficient: float
    coefficients: np.ndarray
    target: np.ndarray
    control: np.ndarray
    base_control: float
    threshold: float

    def figures(self) -> list[Figure]:
        x, least = self.coefficients, self.threshold * self.base_control
        rows = [(c, t, k, k >= least) for c, t, k in zip(x, self.target, self.control, strict=True)]
        lines = {"target": self.target, "control": self.control, "least control": np.full(len(x), least)}
        return [
            Figure(
                "negation",
                "Unlearning a task",
                f"Scores of base - l tau. Chosen: l = {self.coefficient:g}, the lowest target score of those that keep "
                f"{self.threshold:.0%} of the base's control score.",
                ("coefficient", "target", "control", "keeps control"),
                rows,
                lambda figure: plots.curves(figure, x, lines, xlabel="coefficient l", ylabel="score"),
            )
        ]


def negate(
    base: Mapping[str, Any],
    model: Mapping[str, Any],
    target: Callable[[Mapping[str, Any]], float],
    control: Callable[[Mapping[str, Any]], float],
    *,
    coefficients: Sequence[float] | None = None,
    threshold: float = CONTROL_THRESHOLD,
    threads: int = 0,
) -> Negation:
    """Finds how far to go against a task vector, 21 coefficients in [0, 1] unless they are given.

    target, control  f(state) -> score of what is to be forgotten, and of what must stay; `state` is overwritten by the
                     next call. Merge the result with a weight of -coefficient

    The base stands for coefficient 0 whether the grid has it or not, so that something always qualifies.
    Raises RecipeError for negative coefficients and scores that are not finite.
    """
    x = grid_of(coefficients, DEFAULT)
    if x[0] < 0 or not 0 <= threshold <= 1:
        raise RecipeError(
            "negate", f"expected coefficients from 0 on and a threshold in [0, 1], got {x[0]}, {threshold}"
        )
    if x[0] > 0:
        x = np.concatenate([[0.0], x])
    merges = Merges(base, [model], threads=threads)
    scores = np.empty((2, len(x)))
    for i, coefficient in enumerate(x):
        state = merges.at([-coefficient])
        for row, (name, score) in enumerate((("target", target), ("control", control))):
            scores[row, i] = checked_number(score(state), name, f"score at {coefficient:g}")
    base_control = float(scores[1, 0])
    chosen = choose_negation(zip(x, *scores, strict=True), base_control, threshold=threshold)
    return Negation(chosen or 0.0, x, scores[0], scores[1], base_control, threshold)
