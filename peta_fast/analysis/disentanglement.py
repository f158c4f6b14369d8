"""Weight-disentanglement error: how much one task's step changes what the model does on the other's data.

    xi(l1, l2) = sum_{t=1,2} mean over x in D_t of dist( f(x; theta0 + l_t tau_t), f(x; theta0 + l1 tau_1 + l2 tau_2) )

0 where the two steps do not disturb each other; with dist = 1[predictions differ] at most 2.
Cost: with n coefficients, n runs a task for the single models, and n (n - 1) for the merged ones: where the other
coefficient is 0, the merged model is the single one.
Source: Ortiz-Jimenez et al., NeurIPS 2023, arXiv:2305.12827; symmetric KL of features: Jin et al., arXiv:2407.07089.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from peta_fast.analysis import plots
from peta_fast.analysis.figures import Figure
from peta_fast.analysis.merges import Merges, grid_of
from peta_fast.errors import RecipeError

DEFAULT = tuple(np.linspace(-2, 2, 21))
DISTANCES = ("disagreement", "symmetric-kl")
Predict = Callable[[Mapping[str, Any], str], Any]
"""predict(state, task) -> for each example of the task's data a label, logits, features or a text."""


@dataclass(frozen=True)
class DisentanglementError:
    """parts [2, n, n]: each task's term at (l1, l2); runs: how often `predict` was called."""

    names: tuple[str, str]
    coefficients: np.ndarray
    parts: np.ndarray
    distance: str
    runs: int

    @property
    def error(self) -> np.ndarray:
        """[n, n] xi"""
        return self.parts.sum(0)

    def figures(self) -> list[Figure]:
        x, error, (first, second) = self.coefficients, self.error, self.names
        rows = [(x[i], x[j], error[i, j], *self.parts[:, i, j]) for i in range(len(x)) for j in range(len(x))]
        bounded = self.distance == "disagreement"
        what = "share of examples whose prediction changes" if bounded else "symmetric KL divergence of the features"
        return [
            Figure(
                "disentanglement",
                "Weight-disentanglement error",
                f"For each task, the {what} when the other task's step is added; the sum over both tasks. "
                "0: the steps do not disturb each other.",
                (f"coefficient {first}", f"coefficient {second}", "error", f"part {first}", f"part {second}"),
                rows,
                lambda figure: plots.surface(
                    figure, x, x, error, xlabel=f"coefficient of {first}", ylabel=f"coefficient of {second}",
                    low=0.0, high=2.0 if bounded else None, colours="magma",
                ),
                (6.4, 5.2),
            )
        ]  # fmt: skip


def disentanglement_error(
    base: Mapping[str, Any],
    models: Sequence[Mapping[str, Any]],
    predict: Predict,
    *,
    names: Sequence[str] | None = None,
    coefficients: Sequence[float] | None = None,
    distance: str = "disagreement",
    threads: int = 0,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> DisentanglementError:
    """The error over a grid of coefficients, 21 x 21 over [-2, 2] unless they are given.

    base, models  state dicts; two models
    predict       predict(state, task) -> predictions for the task's own examples, of task's own head where heads
                  differ: integers or texts [n], or logits [n, classes], whose largest counts; for "symmetric-kl"
                  features [n, d], which a softmax makes comparable. `state` is overwritten by the next call
    tell          called with runs done and runs in all

    Raises RecipeError when there are not two models, or predictions are not finite or change their number or kind.
    """
    if len(models) != 2:
        raise RecipeError("disentanglement_error", f"expected two models, got {len(models)}", "Choose a pair.")
    if distance not in DISTANCES:
        raise RecipeError("distance", f"expected one of {', '.join(DISTANCES)}, got {distance!r}")
    merges = Merges(base, models, names=names, threads=threads)
    x = grid_of(coefficients, DEFAULT)
    runs = _Runs(merges.names, predict, distance, _total(x), tell)
    zero = {int(i) for i in np.flatnonzero(x == 0)}
    single = [[runs.of(merges.at(w), t) for w in _line(x, t)] for t in range(2)]
    parts = np.zeros((2, len(x), len(x)))
    for i in range(len(x)):
        for j in range(len(x)):
            asked = [t for t, other in ((0, j), (1, i)) if other not in zero]
            state = merges.at((x[i], x[j])) if asked else None
            for t in asked:
                parts[t, i, j] = runs.distance_of(single[t][(i, j)[t]], runs.of(state, t))
    return DisentanglementError(merges.names, x, parts, distance, runs.done)


def _line(x: np.ndarray, task: int):
    """Weights along one task's own axis."""
    return [(value, 0.0) if task == 0 else (0.0, value) for value in x]


def _total(x: np.ndarray) -> int:
    n, zeros = len(x), int((x == 0).sum())
    return 2 * (n + n * (n - zeros))


class _Runs:
    """Calls of `predict`, checked, and what their results differ in."""

    def __init__(self, names, predict: Predict, distance: str, total: int, tell):
        self.names, self.predict, self.distance = names, predict, distance
        self.total, self.tell, self.done = total, tell, 0
        self.shapes: dict[int, tuple] = {}

    def of(self, state: Mapping[str, Any], task: int) -> np.ndarray:
        found = self._read(self.predict(state, self.names[task]), self.names[task])
        if self.shapes.setdefault(task, found.shape) != found.shape:
            problem = f"predictions are {list(found.shape)}, at first they were {list(self.shapes[task])}"
            raise RecipeError(self.names[task], problem, "Predict the same examples, in one order, at every call.")
        self.done += 1
        self.tell(self.done, self.total)
        return found

    def _read(self, result: Any, who: str) -> np.ndarray:
        if hasattr(result, "detach"):
            result = result.detach().cpu()
            result = result.double().numpy() if result.is_floating_point() else result.numpy()
        found = np.array(result)
        if found.dtype.kind == "f" and not np.isfinite(found).all():
            raise RecipeError(who, "predictions are not finite", "Look for NaN in the model's output.")
        if not found.ndim or not found.size or found.dtype.kind not in "iubfU":
            raise RecipeError(who, f"expected one prediction an example, got {found.dtype} {list(found.shape)}")
        if self.distance == "symmetric-kl":
            if found.ndim != 2 or found.dtype.kind != "f":
                raise RecipeError(who, f"expected features [n, d], got {found.dtype} {list(found.shape)}")
            return _log_softmax(found)
        return found.argmax(-1) if found.ndim > 1 else found

    def distance_of(self, single: np.ndarray, merged: np.ndarray) -> float:
        if self.distance == "disagreement":
            return float((single != merged).mean())
        p, q = np.exp(single), np.exp(merged)
        return float(0.5 * ((p - q) * (single - merged)).sum(-1).mean())  # 1/2 [KL(p||q) + KL(q||p)]


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))
