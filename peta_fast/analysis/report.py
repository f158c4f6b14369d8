"""All figures that some checkpoints and evaluators give, for one page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from peta_fast.analysis.disentanglement import disentanglement_error
from peta_fast.analysis.figures import Figure
from peta_fast.analysis.landscape import loss_landscape
from peta_fast.analysis.scores import MOST_MERGES, lambda_curves, score_curves
from peta_fast.analysis.task_vectors import TaskVectors, labels_of, measure
from peta_fast.errors import RecipeError
from peta_fast.formats import open_checkpoint
from peta_fast.formats.hub import locate
from peta_fast.formats.torch_state import torch_state
from peta_fast.formats.trained_only import TrainedTensors, holds_trained_only
from peta_fast.recipe import ModelRef

CURVE_POINTS = 6
"""Weights that each subset of models is merged with, unless fewer points are asked for."""


@dataclass(frozen=True)
class Functions:
    """What evaluates merged models; None leaves its figures out. See scores, disentanglement and landscape."""

    evaluate: Callable | None = None
    predict: Callable | None = None
    loss: Callable | None = None

    @property
    def any(self) -> bool:
        return any((self.evaluate, self.predict, self.loss))


@dataclass(frozen=True)
class Report:
    facts: list[tuple[str, Any]]
    figures: list[Figure]


def report_figures(
    base: str | Path,
    models: Sequence[str | Path],
    *,
    names: Sequence[str] | None = None,
    functions: Functions = Functions(),  # noqa: B008 - frozen
    points: int = 21,
    threads: int = 0,
    tell: Callable[[str], None] = lambda text: None,
) -> Report:
    """The figures of checkpoints on disk: of their task vectors by one reading, of their merges by the functions given.

    points  of each axis of coefficients
    tell    takes lines on what is going on

    Raises what measure, lambda_curves, score_curves, disentanglement_error and loss_landscape raise.
    """
    names = labels_of(models, names)
    if (functions.predict or functions.loss) and len(models) < 2:
        raise RecipeError("models", "expected two models or more for pairs of task vectors, got one")
    found = measure(base, models, names=names, threads=threads, progress=_percent(tell, "reading"))
    figures = found.figures()
    if functions.any:
        figures += _evaluated(base, models, names, functions, points, threads, tell)
    return Report(facts_of(found), figures)


def facts_of(found: TaskVectors) -> list[tuple[str, Any]]:
    """What stands at the page's top."""
    total = found.total
    facts: list[tuple[str, Any]] = [
        ("models", ", ".join(found.names)),
        ("parameters measured", f"{total.size:,}"),
        ("tensors measured", len(found.tensors)),
        ("tensors left out", len(found.left_out)),
    ]
    facts += [(f"norm of {n}, relative", f"{r:.4g}") for n, r in zip(found.names, total.relative, strict=True)]
    if len(found.names) > 1:
        pairs = np.triu_indices(len(found.names), 1)
        facts.append(("mean cosine of pairs", f"{total.cosine[pairs].mean():.4f}"))
        facts.append(("share of parameters in any sign conflict", f"{total.conflict_share:.4f}"))
    return facts


def _evaluated(base, models, names, functions: Functions, points: int, threads: int, tell) -> list[Figure]:
    with ExitStack() as stack:
        states = [_state(path, stack) for path in (base, *models)]
        shared: dict[str, Any] = {"threads": threads}
        figures: list[Figure] = []
        if functions.evaluate:
            one = {**shared, "names": names, "coefficients": np.linspace(0, 1, points)}
            figures += lambda_curves(
                states[0], states[1:], functions.evaluate, tell=_percent(tell, "lambda curves"), **one
            ).figures()
            figures += _score_curves(states, names, functions.evaluate, points, shared, tell)
        pair = {**shared, "names": names[:2]}
        if functions.predict:
            figures += disentanglement_error(
                states[0], states[1:3], functions.predict, coefficients=np.linspace(-2, 2, points),
                tell=_percent(tell, "disentanglement error"), **pair,
            ).figures()  # fmt: skip
        if functions.loss:
            figures += loss_landscape(
                states[0], states[1:3], functions.loss, coefficients=np.linspace(-0.5, 1.5, points),
                tell=_percent(tell, "landscape"), **pair,
            ).figures()  # fmt: skip
        return figures


def _score_curves(states, names, evaluate, points: int, shared, tell) -> list[Figure]:
    """None for a single model, and where every subset would be too many."""
    weights = np.linspace(0, 1, min(points, CURVE_POINTS))[1:]
    subsets = 2 ** len(names) - len(names) - 1
    if len(names) < 2 or subsets * (len(weights) + 1) > MOST_MERGES:
        if len(names) > 1:
            tell(f"{subsets:,} subsets of the models are too many: no curve over the number of tasks")
        return []
    methods = {"task_arithmetic": {"weight": list(weights)}, "average": {"weight": "1/T"}}
    return score_curves(
        states[0], states[1:], evaluate, names=names, methods=methods, tell=_percent(tell, "score curves"), **shared
    ).figures()


def _state(path: str | Path, stack: ExitStack):
    ref = ModelRef.parse(str(path))
    checkpoint = stack.enter_context(open_checkpoint(locate(ref.path, ref.revision)))
    state = torch_state(checkpoint)
    return TrainedTensors(state) if holds_trained_only(checkpoint) else state


def _percent(tell, what: str):
    said = [-10]

    def progress(done: int, total: int) -> None:
        percent = 100 * done // max(total, 1)
        if percent >= said[0] + 10:
            said[0] = percent
            tell(f"{what}: {percent} %")

    return progress
