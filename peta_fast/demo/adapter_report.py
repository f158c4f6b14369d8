"""LoRA against linearized LoRA as a table and as a picture like the paper's figure 5."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from peta_fast.demo.adapters import ALPHA, KINDS, METHODS, RANK, AdapterResult
from peta_fast.demo.extras import import_extra

COLOURS = ("#d55e00", "#0072b2", "#e69f00", "#56b4e9")
"""Of KINDS, from Okabe and Ito's palette."""
LEGEND = (
    "own: mean test accuracy of the tasks' own adapters. N tasks: normalized score of merging N of them, which is the "
    "mean over all tasks of accuracy / accuracy of the task's own adapter of the same kind; mean ± deviation over the "
    "subsets of N tasks. acc.: mean accuracy with all merged. B0≠0: the common starting point has a random B0, else "
    "a zero one."
)


def headings(result: AdapterResult) -> list[str]:
    return ["", "merged by", "own", *(f"{count} tasks" for count in result.counts()), "acc."]


def rows(result: AdapterResult) -> list[list[str]]:
    """One row for each kind and method; the last column is the mean accuracy with all tasks merged."""
    found = []
    for kind in KINDS:
        for method in METHODS:
            scores = [result.mean_and_spread(kind.name, method, count) for count in result.counts()]
            shown = [f"{mean:.3f}±{spread:.2f}" if spread else f"{mean:.3f}" for mean, spread in scores]
            last = result.of(kind.name, method, result.counts()[-1])[0].mean_accuracy
            own = f"{100 * result.own_mean(kind.name):.1f}"
            found.append([kind.name, method.replace("_", " "), own, *shown, f"{100 * last:.1f}"])
    return found


def show(result: AdapterResult, console: Console) -> None:
    drawn = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    for number, heading in enumerate(headings(result)):
        drawn.add_column(heading, justify="right" if number > 1 else "left", no_wrap=True)
    for row in rows(result):
        drawn.add_row(*map(Text, row))
    console.print()
    console.print(drawn)
    console.print(Text(LEGEND))


def markdown(result: AdapterResult) -> str:
    head = headings(result)
    lines = [f"| {' | '.join(head)} |", f"|---|---{'|---:' * (len(head) - 2)}|"]
    lines += [f"| {' | '.join(row)} |" for row in rows(result)]
    return "\n".join(
        [
            "## Adapters: LoRA against linearized LoRA (L-LoRA)",
            "",
            "![normalized score against the number of tasks merged](adapters.png)",
            "",
            *lines,
            "",
            LEGEND,
            "",
            f"- Rank {RANK}, alpha {ALPHA}, on fc1 and fc2 of every layer; one starting point (A0, B0) for all tasks, "
            "one learning rate and number of steps for all kinds. With B0 = 0 linearized LoRA trains B alone.",
            "- Merged are the adapters' parameters, as differences from the starting point; lambda is chosen on the "
            "validation images for every subset, kind and method.",
            "",
        ]
    )


def document(result: AdapterResult) -> dict:
    return {"own": result.own, "base": result.base, "merged": [asdict(m) for m in result.merged]}


def draw(result: AdapterResult, path: Path) -> None:
    """Writes a PNG of 1600 x 720 pixels: one panel for each method. Raises PetaFastError without matplotlib."""
    figure = import_extra("matplotlib.figure").Figure(figsize=(10, 4.5), dpi=160, facecolor="white")
    panels = figure.subplots(1, len(METHODS), sharey=True)
    for axes, method in zip(panels, METHODS, strict=True):
        _panel(axes, result, method)
    panels[0].set_ylabel("normalized score, all tasks", fontsize=10)
    panels[0].legend(frameon=False, fontsize=9, loc="lower right")
    figure.suptitle("Merging adapters: LoRA against linearized LoRA", x=0.02, ha="left", fontsize=14, fontweight="bold")
    figure.subplots_adjust(left=0.075, right=0.985, top=0.84, bottom=0.12, wspace=0.06)
    figure.savefig(path, metadata={"Software": "peta_fast"})


def _panel(axes: Any, result: AdapterResult, method: str) -> None:
    counts = result.counts()
    for number, (kind, colour) in enumerate(zip(KINDS, COLOURS, strict=True)):
        points = [result.mean_and_spread(kind.name, method, count) for count in counts]
        places = [count + (number - 1.5) * 0.03 for count in counts]
        style = "-o" if kind.linearized else "--s"
        axes.errorbar(
            places, [mean for mean, _ in points], [spread for _, spread in points], fmt=style, color=colour, capsize=3,
            markersize=5, linewidth=1.6, label=kind.name,
        )  # fmt: skip
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_xlabel("number of tasks merged", fontsize=10)
    axes.set_title(method.replace("_", " "), fontsize=11)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
