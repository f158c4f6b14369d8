"""How numbers are drawn: heatmaps, lines with bands, landscapes. Takes matplotlib's figures, imports nothing of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#222222", "#b8b8b8")
"""Okabe and Ito's palette, which colour-blind readers can tell apart."""
INK, SOFT, FAINT = "#222222", "#666666", "#e6e6e6"
FEW = 12
"""Rows of a heatmap whose cells still have room for their numbers."""
TICKS = 24
"""Names that fit below an axis."""


def heatmap(figure, values: np.ndarray, names: Sequence[str], *, low: float, high: float, colours: str) -> None:
    """[T, T] with the numbers in the cells where they fit."""
    axes = figure.add_subplot()
    image = axes.imshow(values, vmin=low, vmax=high, cmap=colours)
    places = range(len(names))
    axes.set_xticks(places, names, rotation=45, ha="right", fontsize=9, color=INK)
    axes.set_yticks(places, names, fontsize=9, color=INK)
    axes.tick_params(length=0)
    if len(names) <= FEW:
        for row in places:
            for column in places:
                value = float(values[row, column])
                colour = "white" if (value - low) / (high - low) > 0.6 else INK
                text = f"{round(value, 2) + 0.0:.2f}"  # no -0.00
                axes.text(column, row, text, ha="center", va="center", fontsize=8.5, color=colour)
    _bar(figure, image, axes)


def profile(figure, labels: Sequence[str], lines: Mapping[str, np.ndarray], *, axis: str, zero: bool = True) -> None:
    """One line a task over the layers in their order."""
    axes = figure.add_subplot()
    for number, (name, values) in enumerate(lines.items()):
        axes.plot(range(len(labels)), values, **_style(number), label=name)
    step = -(-len(labels) // TICKS)
    places = range(0, len(labels), step)
    axes.set_xticks(places, [labels[i] for i in places], rotation=60, ha="right", fontsize=8, color=INK)
    _frame(axes, axis)
    if zero:
        axes.set_ylim(bottom=0)
    if len(lines) > 1:
        _legend(axes)


def curves(
    figure, x: Sequence[float], lines: Mapping[str, np.ndarray], *, xlabel: str, ylabel: str, bands=None
) -> None:
    """Lines over numbers; bands: name -> half width, drawn around its line."""
    axes = figure.add_subplot()
    for number, (name, values) in enumerate(lines.items()):
        style = _style(number)
        axes.plot(x, values, **style, label=name)
        if bands and name in bands:
            low, high = values - bands[name], values + bands[name]
            axes.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
    axes.set_xlabel(xlabel, fontsize=10, color=SOFT)
    if len(x) <= TICKS and all(float(v).is_integer() for v in x):
        axes.set_xticks(x)
    _frame(axes, ylabel)
    _legend(axes)


def surface(figure, x, y, values: np.ndarray, *, xlabel: str, ylabel: str, low=None, high=None, colours="viridis",
            points: Mapping[str, tuple[float, float]] | None = None) -> None:  # fmt: skip
    """values [len(x), len(y)] as colours with contours, x to the right; points: named places in it."""
    axes = figure.add_subplot()
    edges = [_edges(np.asarray(places, float)) for places in (x, y)]
    image = axes.pcolormesh(*edges, values.T, cmap=colours, vmin=low, vmax=high, shading="flat")
    if min(values.shape) > 1 and np.isfinite(values).all() and np.ptp(values) > 0:
        axes.contour(x, y, values.T, levels=8, colors="white", linewidths=0.6, alpha=0.7)
    for name, (px, py) in (points or {}).items():
        axes.plot(px, py, "o", color="white", markeredgecolor=INK, markersize=6)
        axes.annotate(name, (px, py), xytext=(6, 5), textcoords="offset points", fontsize=9, color="white")
    axes.set_xlabel(xlabel, fontsize=10, color=SOFT)
    axes.set_ylabel(ylabel, fontsize=10, color=SOFT)
    axes.set_aspect("auto")
    _bar(figure, image, axes)


def bars(figure, names: Sequence[str], groups: Mapping[str, np.ndarray], *, axis: str) -> None:
    """One group of bars a name."""
    axes = figure.add_subplot()
    width = 0.8 / max(len(groups), 1)
    for number, (name, values) in enumerate(groups.items()):
        places = np.arange(len(names)) + (number - (len(groups) - 1) / 2) * width
        axes.bar(places, values, width * 0.92, color=COLOURS[number % len(COLOURS)], label=name, zorder=2)
    axes.set_xticks(range(len(names)), names, fontsize=9, color=INK)
    _frame(axes, axis)
    if len(groups) > 1:
        _legend(axes)


def _edges(centres: np.ndarray) -> np.ndarray:
    """The borders of cells around these centres."""
    if len(centres) < 2:
        return np.array([centres[0] - 0.5, centres[0] + 0.5])
    middle = (centres[1:] + centres[:-1]) / 2
    return np.concatenate([[2 * centres[0] - middle[0]], middle, [2 * centres[-1] - middle[-1]]])


def _style(number: int) -> dict[str, Any]:
    dash = ("-", "--", ":", "-.")[number // len(COLOURS) % 4]
    colour = COLOURS[number % len(COLOURS)]
    return {"color": colour, "linestyle": dash, "marker": "o", "markersize": 3, "linewidth": 1.5}


def _frame(axes, label: str) -> None:
    axes.set_ylabel(label, fontsize=10, color=SOFT)
    axes.grid(axis="y", color=FAINT, linewidth=0.8, zorder=0)
    axes.tick_params(length=0, labelsize=8.5)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _legend(axes) -> None:
    axes.legend(frameon=False, fontsize=8.5, ncols=2)


def _bar(figure, image, axes) -> None:
    bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=8.5)
