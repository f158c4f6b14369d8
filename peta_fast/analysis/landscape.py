"""The loss landscape that two task vectors span.

    L(l1, l2) = loss_1(theta) + loss_2(theta),   theta = theta0 + l1 tau_1 + l2 tau_2

The base is at (0, 0), the fine-tunes at (1, 0) and (0, 1), task arithmetic on the diagonal.
Source: Tang et al., ICLR 2024, arXiv:2310.04742, figure 1, as its caption defines it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from peta_fast.analysis import plots
from peta_fast.analysis.figures import Figure
from peta_fast.analysis.merges import Merges, checked_number, grid_of
from peta_fast.errors import RecipeError

DEFAULT = tuple(np.linspace(-0.5, 1.5, 21))
Loss = Callable[[Mapping[str, Any], str], float]
"""loss(state, task) -> mean loss on the task's data."""


@dataclass(frozen=True)
class Landscape:
    """parts [2, n, n]: each task's mean loss at (l1, l2)."""

    names: tuple[str, str]
    coefficients: np.ndarray
    parts: np.ndarray

    @property
    def loss(self) -> np.ndarray:
        """[n, n] the sum of both."""
        return self.parts.sum(0)

    @property
    def lowest(self) -> tuple[float, float]:
        """The coefficients of the lowest loss on the grid."""
        i, j = np.unravel_index(int(self.loss.argmin()), self.loss.shape)
        return float(self.coefficients[i]), float(self.coefficients[j])

    def figures(self) -> list[Figure]:
        x, loss, (first, second) = self.coefficients, self.loss, self.names
        rows = [(x[i], x[j], loss[i, j], *self.parts[:, i, j]) for i in range(len(x)) for j in range(len(x))]
        places = {"base": (0.0, 0.0), first: (1.0, 0.0), second: (0.0, 1.0), "lowest": self.lowest}
        inside = {n: p for n, p in places.items() if all(x[0] <= c <= x[-1] for c in p)}
        return [
            Figure(
                "landscape",
                "Loss landscape",
                f"Sum of the mean losses of {first} and {second} at base + l1 tau_1 + l2 tau_2.",
                (f"coefficient {first}", f"coefficient {second}", "loss", f"loss {first}", f"loss {second}"),
                rows,
                lambda figure: plots.surface(
                    figure, x, x, loss, xlabel=f"coefficient of {first}", ylabel=f"coefficient of {second}",
                    points=inside,
                ),
                (6.4, 5.2),
            )
        ]  # fmt: skip


def loss_landscape(
    base: Mapping[str, Any],
    models: Sequence[Mapping[str, Any]],
    loss: Loss,
    *,
    names: Sequence[str] | None = None,
    coefficients: Sequence[float] | None = None,
    threads: int = 0,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> Landscape:
    """Both tasks' losses over a grid of coefficients, 21 x 21 over [-0.5, 1.5] unless they are given.

    base, models  state dicts; two models
    loss          loss(state, task) -> mean loss of the state on the task's data; the next call overwrites `state`

    Raises RecipeError when there are not two models, or a loss is not a finite number.
    """
    if len(models) != 2:
        raise RecipeError("loss_landscape", f"expected two models, got {len(models)}", "Choose a pair.")
    merges = Merges(base, models, names=names, threads=threads)
    x = grid_of(coefficients, DEFAULT)
    parts = np.empty((2, len(x), len(x)))
    for i in range(len(x)):
        for j in range(len(x)):
            state = merges.at((x[i], x[j]))
            for t, name in enumerate(merges.names):
                where = f"loss at ({x[i]:g}, {x[j]:g})"
                parts[t, i, j] = checked_number(loss(state, name), name, where)
            tell(i * len(x) + j + 1, len(x) ** 2)
    return Landscape(merges.names, x, parts)
