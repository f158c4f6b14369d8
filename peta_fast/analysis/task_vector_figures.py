"""The figures and tables of measured task vectors."""

from __future__ import annotations

import numpy as np

from peta_fast.analysis import plots
from peta_fast.analysis.figures import Figure
from peta_fast.analysis.task_vectors import TaskVectors


def figures_of(found: TaskVectors) -> list[Figure]:
    several = [_cosine(found), _pairs(found)] if len(found.names) > 1 else []
    conflicts = [_conflicts(found)] if len(found.names) > 1 else []
    return [*several, _norms(found), *conflicts, _tensors(found)]


def _pair_rows(found: TaskVectors, values: np.ndarray) -> list[tuple]:
    return [(name, *values[t]) for t, name in enumerate(found.names)]


def _square(tasks: int) -> tuple[float, float]:
    side = min(4.0 + 0.35 * tasks, 12.0)
    return side + 1.2, side


def _cosine(found: TaskVectors) -> Figure:
    cosine, names = found.total.cosine, found.names
    return Figure(
        "cosine",
        "Angles between task vectors",
        "Cosine similarity of whole task vectors (fine-tuned - base, all trained tensors flattened). 0: orthogonal, as "
        "random directions are, and easy to add up; 1: the same direction.",
        ("model", *names),
        _pair_rows(found, cosine),
        lambda figure: plots.heatmap(figure, cosine, names, low=min(0.0, cosine.min()), high=1.0, colours="Blues"),
        _square(len(names)),
    )


def _pairs(found: TaskVectors) -> Figure:
    total = found.total
    shares, names = total.conflicts / max(total.size, 1), found.names
    highest = max(0.5, float(shares.max()))
    return Figure(
        "sign_conflicts_by_pair",
        "Sign conflicts of pairs",
        "Share of the parameters that two task vectors move in opposite directions. Unrelated vectors that are nowhere "
        "zero: 0.5.",
        ("model", *names),
        _pair_rows(found, shares),
        lambda figure: plots.heatmap(figure, shares, names, low=0.0, high=highest, colours="Oranges"),
        _square(len(names)),
    )


def _norms(found: TaskVectors) -> Figure:
    labels, sums = list(found.layers), list(found.layers.values())
    relative = np.array([s.relative for s in sums])
    rows = [
        (label, s.size, *s.norms, *s.relative, *(s.nonzero / max(s.size, 1)))
        for label, s in zip(labels, sums, strict=True)
    ]
    kinds = ("norm", "relative norm", "nonzero share")
    return Figure(
        "norms",
        "How far each layer moved",
        "Euclidean norm of the task vector in each layer, that of the base's weights there being 1.",
        ("layer", "parameters", *(f"{kind} {name}" for kind in kinds for name in found.names)),
        rows,
        lambda figure: plots.profile(
            figure, labels, {name: relative[:, t] for t, name in enumerate(found.names)}, axis="norm / norm of the base"
        ),
    )


def _conflicts(found: TaskVectors) -> Figure:
    labels, sums = list(found.layers), list(found.layers.values())
    pairs = np.triu_indices(len(found.names), 1)
    rows = [
        (label, s.size, s.conflict_share, s.conflicts[pairs].mean() / max(s.size, 1), s.cosine[pairs].mean())
        for label, s in zip(labels, sums, strict=True)
    ]
    lines = {
        "any two models": np.array([row[2] for row in rows]),
        "mean of the pairs": np.array([row[3] for row in rows]),
        "mean cosine of the pairs": np.array([row[4] for row in rows]),
    }
    return Figure(
        "sign_conflicts",
        "Where the models disagree",
        "By layer: share of the parameters that any two models move in opposite directions, the mean of that share "
        "over the pairs, and the mean cosine of the pairs within the layer.",
        ("layer", "parameters", "share in any conflict", "mean share of the pairs", "mean cosine of the pairs"),
        rows,
        lambda figure: plots.profile(figure, labels, lines, axis="share of the parameters; cosine", zero=False),
    )


def _tensors(found: TaskVectors) -> Figure:
    kinds = ("norm", "relative norm", "L1", "largest", "nonzero")
    rows = [
        (name, s.size, s.conflict_share, *s.norms, *s.relative, *s.l1, *s.largest.astype(float), *s.nonzero)
        for name, s in found.tensors.items()
    ]
    return Figure(
        "tensors",
        "Every tensor",
        "Norms of the task vectors, absolute and relative to the base; sums and maxima of |tau|; counts of what moved.",
        (
            "tensor",
            "parameters",
            "share in any conflict",
            *(f"{kind} {name}" for kind in kinds for name in found.names),
        ),
        rows,
        None,
    )
