"""The demonstration's table on the console, in results.md, and its numbers in results.json."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from peta_fast.demo import adapter_report
from peta_fast.demo.data import UPRIGHT, Digits
from peta_fast.demo.progress import say
from peta_fast.demo.results import BASE, FINETUNE, MERGE, DemoResult, Row
from peta_fast.demo.train import Regime

LEGEND = (
    "Accuracy in percent on the test images. only X: the fine-tune of task X. norm.: mean over the tasks of "
    f"accuracy / accuracy of the task's own fine-tune. {UPRIGHT}: the base's own domain, no task, not in the mean."
)


def headings(result: DemoResult) -> list[str]:
    return ["", *result.tasks, "mean", "norm.", UPRIGHT, "scale"]


def cells(result: DemoResult, row: Row) -> list[str]:
    """The row as text: accuracies in percent, the normalized score as a fraction."""
    accuracies = [f"{100 * row.accuracy[task]:.1f}" for task in result.tasks]
    scaling = "" if row.scaling is None else f"{row.scaling:g}"
    derived = [f"{100 * result.mean(row):.1f}", f"{result.normalized(row):.3f}"]
    name = f"only {row.name}" if row.kind == FINETUNE else row.name
    return [name, *accuracies, *derived, f"{100 * row.accuracy[UPRIGHT]:.1f}", scaling]


def table(result: DemoResult) -> Table:
    """A rich table, 78 columns wide at most; fine-tunes are bold on their own task, the best merge in whole."""
    drawn = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    for number, heading in enumerate(headings(result)):
        drawn.add_column(heading, justify="right" if number else "left", no_wrap=True)
    for kind in (BASE, FINETUNE, MERGE):
        for row in result.of_kind(kind):
            style = "bold green" if row is result.best else ""
            drawn.add_row(*_emphasized(result, row), style=style, end_section=row is result.of_kind(kind)[-1])
    return drawn


def _emphasized(result: DemoResult, row: Row) -> list[Text]:
    own = headings(result).index(row.name) if row.kind == FINETUNE else None
    return [Text(cell, style="bold" if number == own else "") for number, cell in enumerate(cells(result, row))]


def show(result: DemoResult, console: Console) -> None:
    """Prints the table, what it means, where things are and what to try next."""
    out, best = result.out, result.best
    console.print()
    console.print(table(result))
    console.print()
    console.print(Text(summary(result)))
    console.print(Text(LEGEND))
    if result.adapters is not None:
        adapter_report.show(result.adapters, console)
    say(console, f"\n{result.seconds:.0f} s. Checkpoints, recipes, results.json and results.md are in {out}/")
    say(console, f"Pictures: {out / 'accuracy.png'}, {out / 'adapters.png'}")
    command = [program(), "merge", (best.recipe or out).as_posix(), "my_merge"]
    say(console, f"Next:    {shlex.join(command)}")


def summary(result: DemoResult) -> str:
    """The finding in one sentence."""
    best, base = result.best, result.row("base")
    return (
        f"One model, merged by {best.name} (best on validation), reaches {result.normalized(best):.1%} of what the "
        f"{len(result.tasks)} fine-tunes reach, each on its own task; the base {result.normalized(base):.1%}."
    )


def write(result: DemoResult, digits: Digits, regime: Regime) -> None:
    """Writes results.json and results.md into the output folder."""
    document = {
        "seed": result.seed,
        "quick": result.quick,
        "seconds": round(result.seconds, 1),
        "images": {"train": len(digits.train), "validation": len(digits.validation), "test": len(digits.test)},
        "regime": asdict(regime),
        "tasks": list(result.tasks),
        "rows": [_document(result, row) for row in result.rows],
        "adapters": result.adapters and adapter_report.document(result.adapters),
    }
    (result.out / "results.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    (result.out / "results.md").write_text(markdown(result, digits, regime), encoding="utf-8")


def _document(result: DemoResult, row: Row) -> dict:
    return {
        "name": row.name,
        "kind": row.kind,
        "checkpoint": row.checkpoint.as_posix(),
        "recipe": row.recipe and row.recipe.as_posix(),
        "scaling": row.scaling,
        "validation": row.validated,
        "candidates": {str(scaling): score for scaling, score in row.candidates.items()},
        "test": dict(row.accuracy),
        "mean": result.mean(row),
        "normalized": result.normalized(row),
    }


def markdown(result: DemoResult, digits: Digits, regime: Regime) -> str:
    """The table with what one must know to judge it."""
    head = headings(result)
    lines = [f"| {' | '.join(head)} |", f"|---{'|---:' * (len(head) - 1)}|"]
    lines += [f"| {' | '.join(cells(result, row))} |" for row in result.rows]
    few = regime.few_per_digit
    return "\n".join(
        [
            "# Four tasks, one model",
            "",
            summary(result),
            "",
            "![accuracy](accuracy.png)",
            "",
            *lines,
            "",
            LEGEND,
            "",
            f"- Data: scikit-learn's handwritten digits, {len(digits.train)} images for training, "
            f"{len(digits.validation)} for validation, {len(digits.test)} for testing, split by seed {result.seed}.",
            f"- Base: {regime.base_epochs} epochs on the upright training images and on {few} images a digit "
            f"({10 * few} in all) of each task's domain.",
            f"- Fine-tunes: {regime.task_epochs} epochs from the base on the training images of one domain, all "
            "weights, no other domain.",
            "- Merges: the recipes in `recipes/`. Their scaling, and which merge is called the best, are chosen by "
            "mean accuracy on the validation images; all else is fixed. Test images are used for the table alone.",
            "",
            adapter_report.markdown(result.adapters) if result.adapters else "",
        ]
    )


def program() -> str:
    """peta-fast as the reader can call it: by its name where that is found, else by the path that has started this."""
    started = Path(sys.argv[0])
    return started.as_posix() if started.name == "peta-fast" and not shutil.which("peta-fast") else "peta-fast"
