"""The demonstration's picture: accuracy of every merge on every task, with the tasks shown as images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peta_fast.demo.data import Images
from peta_fast.demo.extras import import_extra
from peta_fast.demo.results import MERGE, DemoResult, Row

COLOURS = {
    "base": "#b8b8b8",
    "linear": "#56b4e9",
    "task_arithmetic": "#0072b2",
    "ties": "#d55e00",
    "dare_ties": "#e69f00",
    "breadcrumbs": "#009e73",
}
"""Okabe and Ito's palette, which colour-blind readers can tell apart."""

BAR = 0.14
"""Width of a bar, where groups are 1 apart."""

INK, SOFT = "#222222", "#666666"


def draw(result: DemoResult, test: Images, path: Path) -> None:
    """Writes a PNG of 1600 x 960 pixels; bars start at zero. Raises PetaFastError when matplotlib is not installed."""
    figure = import_extra("matplotlib.figure").Figure(figsize=(10, 6), dpi=160, facecolor="white")
    axes = figure.add_axes((0.078, 0.215, 0.907, 0.595))
    _bars(axes, result)
    _own_lines(axes, result)
    _frame(axes, result)
    _examples(figure, axes, result, test)
    _title(figure, axes, result)
    figure.savefig(path, metadata={"Software": "peta_fast"})


def _shown(result: DemoResult) -> list[Row]:
    return [result.row("base"), *result.of_kind(MERGE)]


def _groups(result: DemoResult) -> list[float]:
    """Centre of each task's group, and of the mean's, which stands a little apart."""
    return [*map(float, range(len(result.tasks))), len(result.tasks) + 0.15]


def _bars(axes: Any, result: DemoResult) -> None:
    rows, groups = _shown(result), _groups(result)
    for number, row in enumerate(rows):
        heights = [100 * row.accuracy[task] for task in result.tasks] + [100 * result.mean(row)]
        places = [group + (number - (len(rows) - 1) / 2) * BAR for group in groups]
        axes.bar(places, heights, BAR * 0.92, color=COLOURS[row.name], label=row.name.replace("_", " "), zorder=2)
        axes.text(places[-1], heights[-1] + 0.8, f"{heights[-1]:.0f}", ha="center", fontsize=8.5, color=INK, zorder=4)


def _own_lines(axes: Any, result: DemoResult) -> None:
    own = [100 * result.own(task) for task in result.tasks] + [100 * result.own_mean()]
    half = BAR * len(_shown(result)) / 2 + 0.02
    groups = _groups(result)
    left, right = [group - half for group in groups], [group + half for group in groups]
    axes.hlines(own, left, right, color=INK, linewidth=1.6, label="own fine-tune", zorder=3)


def _frame(axes: Any, result: DemoResult) -> None:
    axes.set_ylim(0, 105)
    axes.set_xlim(-0.5, _groups(result)[-1] + 0.5)
    axes.set_xticks(_groups(result), [*result.tasks, "mean of the tasks"], fontsize=11, color=INK)
    axes.set_yticks(range(0, 101, 20), [f"{tick} %" for tick in range(0, 101, 20)], fontsize=9.5, color=SOFT)
    axes.set_ylabel("test accuracy", fontsize=10.5, color=SOFT)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8, zorder=0)
    axes.tick_params(length=0)
    axes.axvline((_groups(result)[-1] + _groups(result)[-2]) / 2, color="#d0d0d0", linewidth=0.8, zorder=1)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#999999")


def _examples(figure: Any, axes: Any, result: DemoResult, test: Images) -> None:
    """Under each task, the same three digits as that task sees them."""
    few = test.few_per_digit(1)
    for group, task in zip(_groups(result), result.tasks, strict=False):
        pixels = few.seen_as(task).pixels
        centre = axes.transData.transform((group, 0))[0] / figure.bbox.width
        for place, digit in enumerate((3, 5, 7)):
            tile = figure.add_axes((centre + (place - 1.5) * 0.047, 0.06, 0.044, 0.1))
            tile.imshow(pixels[digit].numpy(), cmap="gray_r", vmin=0, vmax=1)
            tile.set_xticks([])
            tile.set_yticks([])
            for spine in tile.spines.values():
                spine.set_color("#cccccc")


def _title(figure: Any, axes: Any, result: DemoResult) -> None:
    best, base = result.best, result.row("base")
    figure.text(0.015, 0.945, "One merged model for four tasks", fontsize=17, fontweight="bold", color=INK)
    subtitle = (
        f"Fine-tuned apart, merged without training: {best.name.replace('_', ' ')} keeps "
        f"{result.normalized(best):.0%} of the fine-tunes' accuracy, the base has {result.normalized(base):.0%}"
    )
    figure.text(0.015, 0.897, subtitle, fontsize=11, color=SOFT)
    axes.legend(
        loc="lower left", bbox_to_anchor=(-0.02, 1.025), ncols=7, frameon=False, fontsize=9.5, handlelength=1.1,
        columnspacing=1.3, handletextpad=0.5, borderaxespad=0,
    )  # fmt: skip
