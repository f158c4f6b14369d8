"""The pictures: scores by method and kind, over the number of tasks, of pairs, over lambda; angles of task vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from peta_fast.analysis.plots import FAINT, INK, SOFT
from peta_fast.demo.extras import import_extra
from peta_fast.demo.full.kinds import KINDS
from peta_fast.demo.full.merges import METHODS, SCALED
from peta_fast.demo.full.results import TrackResult, mean_and_spread

SHORT = {"full": "full", "attention": "attention", "lora": "LoRA", "linear_layer": "L-LoRA\nlayers",
         "linear_model": "L-LoRA\nmodel"}  # fmt: skip
LINES = {"full": ("#222222", "-o"), "attention": ("#009e73", "-^"), "lora": ("#d55e00", "--s"),
         "linear_layer": ("#0072b2", "-o"), "linear_model": ("#56b4e9", "-D")}  # fmt: skip
"""Colours of Okabe and Ito, which colour-blind readers can tell apart, and markers."""
OVER_NUMBER = ("task_arithmetic", "ties", "regmean", "adamerging")
DPI = 144


def scores(tracks: Sequence[TrackResult]) -> Any:
    """Methods by kinds: mean normalized score of all tasks merged, with its deviation below."""
    figure = canvas(11, 5.6, "Normalized score with all tasks merged")
    panels = figure.subplots(1, len(tracks), squeeze=False)[0]
    for axes, track in zip(panels, tracks, strict=True):
        values = np.full((len(METHODS), len(KINDS)), np.nan)
        texts = [["left\nout"] * len(KINDS) for _ in METHODS]
        for i, method in enumerate(METHODS):
            for j, kind in enumerate(KINDS):
                if method in track.merges[kind]:
                    mean, spread = mean_and_spread(track.normalized(kind, method))
                    values[i, j], texts[i][j] = mean, f"{mean:.2f}\n±{spread:.2f}"
        cells(axes, values, list(METHODS.values()), [SHORT[k] for k in KINDS], texts, span(values))
        axes.set_title(f"{track.name}, {len(track.tasks)} tasks", fontsize=11, color=INK, loc="left")
    return figure


def numbers(tracks: Sequence[TrackResult]) -> Any:
    """As figure 5 of Tang et al.: against the number of tasks merged, over all tasks, merged or not."""
    figure = canvas(12, 3.1 * len(tracks) + 0.7, "Normalized score, mean over all tasks, against the number merged")
    rows = figure.subplots(len(tracks), len(OVER_NUMBER), squeeze=False, sharey="row")
    for row, track in zip(rows, tracks, strict=True):
        counts = [1, *track.counts()]
        for axes, method in zip(row, OVER_NUMBER, strict=True):
            for kind in KINDS:
                if method in track.merges[kind]:
                    points = [mean_and_spread(track.by_number(kind, method, n)) for n in counts]
                    line(axes, kind, counts, points)
            axes.set_xticks(counts)
            axes.set_title(METHODS[method], fontsize=10, color=INK, loc="left")
            frame(axes)
        row[0].set_ylabel(track.name, fontsize=11, color=SOFT)
    for axes in rows[-1]:
        axes.set_xlabel("tasks merged", fontsize=9, color=SOFT)
    legend(figure, rows)
    return figure


def curves(tracks: Sequence[TrackResult]) -> Any:
    """Validation scores over lambda, all tasks merged."""
    figure = canvas(10.5, 3.1 * len(tracks) + 0.7, "Normalized validation score against lambda, all tasks merged")
    rows = figure.subplots(len(tracks), len(SCALED), squeeze=False, sharey="row")
    for row, track in zip(rows, tracks, strict=True):
        for axes, method in zip(row, SCALED, strict=True):
            for kind in KINDS:
                curve = track.curve(kind, method)
                line(axes, kind, list(curve), [(score, 0.0) for score in curve.values()])
            axes.set_title(METHODS[method], fontsize=10, color=INK, loc="left")
            frame(axes)
        row[0].set_ylabel(track.name, fontsize=11, color=SOFT)
    for axes in rows[-1]:
        axes.set_xlabel("lambda", fontsize=9, color=SOFT)
    legend(figure, rows)
    return figure


def pairs(tracks: Sequence[TrackResult]) -> Any:
    """Of every pair merged by task arithmetic: mean normalized score of the two."""
    return squares(tracks, "Pairs merged by task arithmetic: normalized score of the two", _pair, "viridis", None)


def _pair(track: TrackResult, kind: str, i: int, j: int) -> float:
    return np.nan if i == j else track.pair(kind, "task_arithmetic", track.tasks[i], track.tasks[j])


def cosines(tracks: Sequence[TrackResult]) -> Any:
    """Cosines of task vectors."""

    def value(track: TrackResult, kind: str, i: int, j: int) -> float:
        return float(np.mean([v["cosine"][i][j] for v in track.vectors[kind]])) if i != j else np.nan

    return squares(tracks, "Cosines of the task vectors, each kind in its own space", value, "viridis", (0.0, None))


def squares(tracks: Sequence[TrackResult], title: str, value: Callable[..., float], colours: str, limits) -> Any:
    """A panel a track and kind, tasks by tasks; one scale of colours a track."""
    figure = canvas(12, 2.9 * len(tracks) + 0.6, title)
    rows = figure.subplots(len(tracks), len(KINDS), squeeze=False)
    for row, track in zip(rows, tracks, strict=True):
        count = range(len(track.tasks))
        found = {k: np.array([[value(track, k, i, j) for j in count] for i in count]) for k in KINDS}
        low, high = span(np.stack(list(found.values())))
        low = low if limits is None else min(limits[0], low)
        for axes, kind in zip(row, KINDS, strict=True):
            texts = [["" if np.isnan(v) else f"{v:.2f}" for v in line] for line in found[kind]]
            names = track.tasks if axes is row[0] else [""] * len(track.tasks)
            cells(axes, found[kind], names, track.tasks, texts, (low, high), colours)
            axes.tick_params(axis="x", rotation=35)
            for label in axes.get_xticklabels():
                label.set_ha("right")
            axes.set_title(SHORT[kind].replace("\n", ", "), fontsize=10, color=INK, loc="left")
        row[0].set_ylabel(track.name, fontsize=11, color=SOFT)
    return figure


def cells(axes, values: np.ndarray, rows, columns, texts, limits: tuple[float, float], colours="viridis") -> None:
    """A table in colours, with the numbers in it."""
    low, high = limits
    axes.imshow(np.ma.masked_invalid(values), vmin=low, vmax=high, cmap=colours, aspect="auto")
    axes.set_facecolor(FAINT)
    axes.set_xticks(range(len(columns)), columns, fontsize=8.5, color=INK)
    axes.set_yticks(range(len(rows)), rows, fontsize=8.5, color=INK)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    for i in range(len(rows)):
        for j in range(len(columns)):
            dark = not np.isnan(values[i, j]) and (values[i, j] - low) / max(high - low, 1e-9) < 0.6
            axes.text(j, i, texts[i][j], ha="center", va="center", fontsize=7.8, linespacing=0.95,
                      color="white" if dark else INK)  # fmt: skip


def span(values: np.ndarray) -> tuple[float, float]:
    return float(np.nanmin(values)), float(np.nanmax(values))


def line(axes, kind: str, x: Sequence[float], points: Sequence[tuple[float, float]]) -> None:
    colour, style = LINES[kind]
    means, spreads = np.array(points).T
    axes.plot(x, means, style, color=colour, markersize=4, linewidth=1.5, label=KINDS[kind])
    if spreads.any():
        axes.fill_between(x, means - spreads, means + spreads, color=colour, alpha=0.13, linewidth=0)


def frame(axes) -> None:
    axes.grid(axis="y", color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=8.5)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def legend(figure, rows) -> None:
    handles, names = rows[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False, fontsize=9)


def canvas(width: float, height: float, title: str) -> Any:
    figure = import_extra("matplotlib.figure").Figure(
        figsize=(width, height), dpi=DPI, facecolor="white", layout="constrained"
    )
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold", color=INK)
    return figure


FIGURES = {"scores": scores, "number_of_tasks": numbers, "pairs": pairs, "lambda": curves, "cosines": cosines}
"""File name without its suffix -> what is drawn."""


def write(tracks: Sequence[TrackResult], folder: Path) -> None:
    for name, draw in FIGURES.items():
        draw(tracks).savefig(folder / f"{name}.png", metadata={"Software": "peta_fast"})
