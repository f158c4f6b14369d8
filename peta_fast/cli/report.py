"""`peta-fast report`: figures of task vectors and of their merges, on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from peta_fast.cli._options import AsJson, Threads
from peta_fast.cli._parser import Argument, Option

EPILOG = """What is evaluated, each a Python function as MODULE:FUNCTION (found from the current folder too):
  --eval     f(state, parameters) -> {task: score}, higher is better, for all models' names as tasks
  --predict  f(state, task) -> predictions of that task's examples: labels, logits or texts
  --loss     f(state, task) -> mean loss on that task's data
state is a dict name -> torch tensor that the next call overwrites; task is a model's name."""

OPTIONS = {"evaluate": "--eval", "predict": "--predict", "loss": "--loss"}
"""Keyword of Functions -> the option that names it."""


def report(
    base: Annotated[str, Argument("BASE", "model folder, weight file or hub id that the others were tuned from")],
    models: Annotated[list[str], Argument("MODEL", "the fine-tuned ones")],
    out: Annotated[Path, Option("--out", help="Folder for index.html, PNG and CSV files.")] = Path("peta_fast_report"),
    names: Annotated[str | None, Option("--names", help="Comma-separated names of the models.")] = None,
    evaluate: Annotated[str | None, Option("--eval", help="Scores of merges: curves over lambda and tasks.")] = None,
    predict: Annotated[str | None, Option("--predict", help="Predictions: the disentanglement error.")] = None,
    loss: Annotated[str | None, Option("--loss", help="Losses: the landscape of the first two models.")] = None,
    points: Annotated[int, Option("--points", help="Of each grid over lambda.", low=2)] = 21,
    force: Annotated[bool, Option("--force", help="Replace a report in OUT.")] = False,
    threads: Threads = 0,
    quiet: Annotated[bool, Option("--quiet/--no-quiet", "-q", help="No progress on stderr.")] = False,
    as_json: AsJson = False,
) -> int:
    """Draw how task vectors of fine-tuned models relate. Reads every checkpoint once; with --eval, --predict or
    --loss also what merges of them do. Needs matplotlib."""
    from peta_fast.analysis.figures import require_matplotlib
    from peta_fast.analysis.page import require_free, write_figures
    from peta_fast.analysis.report import Functions, report_figures
    from peta_fast.cli._functions import function_at, reporting

    require_matplotlib()
    require_free(out, force, inputs=[base, *models])
    given = {"evaluate": evaluate, "predict": predict, "loss": loss}
    spelled = {name: text for name, text in given.items() if text is not None}
    functions = Functions(**{
        name: reporting(OPTIONS[name], text, function_at(OPTIONS[name], text)) for name, text in spelled.items()
    })  # fmt: skip
    labels = names.split(",") if names is not None else None
    found = report_figures(
        base, models, names=labels, functions=functions, points=points, threads=threads, tell=_teller(quiet)
    )
    page = write_figures(found.figures, out, title=f"Task vectors of {Path(base).name}", facts=found.facts, force=force)
    _print(found, page, as_json)
    return 0


def _teller(quiet: bool):
    import sys

    def tell(text: str) -> None:
        if not quiet:
            print(text, file=sys.stderr, flush=True)

    return tell


def _print(found, page: Path, as_json: bool) -> None:
    from peta_fast.cli._text import print_facts, print_json

    if as_json:
        print_json({**dict(found.facts), "page": str(page), "figures": [figure.name for figure in found.figures]})
        return
    print_facts({str(name): str(value) for name, value in found.facts} | {"page": str(page)})
