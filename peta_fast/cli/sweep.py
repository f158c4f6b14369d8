"""`peta-fast sweep`: one recipe at every point of a grid, as checkpoints or through an evaluator."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

from peta_fast.cli._options import AsJson, Compat, MaxShardSize, Seed, Threads
from peta_fast.cli._parser import Argument, Option

EPILOG = """A key of the grid is one of the method's keys, seed or trim_scope; of one model alone it is weight.NAME,
NAME the model's folder, or weight.0 for the first. It takes the place of what the recipe says.

  peta-fast sweep ties.yml OUT --grid weight=0.1:1.0:0.1 density=0.1,0.2,0.5
  peta-fast sweep ties.yml OUT --grid weight=0.1:1.0:0.1 --eval scores:accuracy --model scores:load --best max

The evaluator is evaluate(state or model, parameters) and returns a number or a dict of numbers. Without --eval every
point becomes a checkpoint in a folder of its own. OUT gets results.csv, results.json, results.png, and with --best the
folder best."""


def sweep(
    recipe: Annotated[Path, Argument("RECIPE", "mergekit's YAML")],
    out: Annotated[Path, Argument("OUT", "folder for what comes out")],
    grid: Annotated[
        list[str] | None,
        Option("--grid", several=True, metavar="KEY=VALUES", help="weight=0.1:1.0:0.1 or density=0.1,0.2; several."),
    ] = None,
    evaluator: Annotated[str | None, Option("--eval", help="module:function or file.py:function.")] = None,
    model: Annotated[str | None, Option("--model", help="module:function that makes the model to merge into.")] = None,
    best: Annotated[str | None, Option("--best", help="max or min: write the best variant into OUT/best.")] = None,
    metric: Annotated[str | None, Option("--metric", help="Which score of a dict counts; the first.")] = None,
    resume: Annotated[bool, Option("--resume", help="Go on with a killed sweep.")] = False,
    force: Annotated[bool, Option("--force", help="Replace what an earlier sweep left in OUT.")] = False,
    yes: Annotated[bool, Option("--yes", help="Go through more than 1,000 points.")] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Print the points and write nothing.")] = False,
    max_memory: Annotated[
        str | None,
        Option("--max-memory", help="Bound of working memory [768MB]; with --eval, of variants held at once [4GB]."),
    ] = None,
    max_shard_size: MaxShardSize = "5GB",
    threads: Threads = 0,
    compat: Compat = None,
    seed: Seed = None,
    allow_nonfinite: Annotated[bool, Option("--allow-nonfinite", help="NaN and infinities are no fault.")] = False,
    quiet: Annotated[bool, Option("--quiet/--no-quiet", "-q", help="No progress on stderr.")] = False,
    as_json: AsJson = False,
) -> int:
    """Merge by a recipe at every point of a grid, from shared readings of the inputs."""
    from peta_fast.cli._errors import UsageError

    if not grid:
        raise UsageError("--grid", "expected at least one KEY=VALUES", "For example --grid weight=0.1:1.0:0.1")
    for name, value in (("--model", model), ("--best", best), ("--metric", metric)):
        if value is not None and evaluator is None:
            raise UsageError(name, "goes with --eval, which is missing")
    if best not in (None, "max", "min"):
        raise UsageError("--best", f"expected max or min, got {best!r}")
    found = _planned(recipe, grid, compat, seed, max_memory if evaluator else None, threads, allow_nonfinite)
    if not quiet:
        print(f"peta-fast: {describe(found)}", file=sys.stderr, flush=True)
    if dry_run:
        return _print_points(found, as_json)
    found.require_yes(yes)
    if evaluator is None:
        from peta_fast.cli._batch import run_many
        from peta_fast.cli._planning import shard_bytes

        memory, shard = max_memory or "768MB", shard_bytes(max_shard_size)
        return run_many(
            lambda tell: found.write(
                out, max_memory=memory, max_shard_size=shard, resume=resume, force=force, yes=yes, progress=tell
            ), out, quiet, as_json,
        )  # fmt: skip
    from peta_fast.cli._functions import function_at

    function = function_at(evaluator, "eval")
    found.into = function_at(model, "model")() if model else None
    return _evaluate(found, function, out, evaluator, best, metric, resume, force, yes, quiet, as_json)


def _planned(recipe: Path, grid, compat, seed, max_memory, threads, allow_nonfinite):
    import dataclasses

    from peta_fast._grid import Grid, read_axes
    from peta_fast.merging import parse_bytes
    from peta_fast.sweeps import Sweep, load_swept

    axes = read_axes(grid)
    loaded = load_swept(recipe, axes, compat)
    if seed is not None:
        loaded = dataclasses.replace(loaded, seed=seed)
    memory = parse_bytes(max_memory or "4GB", "--max-memory")
    return Sweep(
        loaded, Grid(loaded, axes), sources=None, into=None, max_memory=memory, threads=threads,
        allow_nonfinite=allow_nonfinite,
    )  # fmt: skip


def describe(found) -> str:
    """20 points: 5 of weight x 4 of density"""
    axes = " x ".join(f"{len(axis.values):,} of {axis.key}" for axis in found.grid.axes)
    return f"{len(found):,} points: {axes}"


def _print_points(found, as_json: bool) -> int:
    from peta_fast.cli._text import ROWS, print_json

    names = [found.grid.name(i) for i in range(min(len(found), ROWS))]
    if as_json:
        print_json({"points": len(found), "axes": {a.key: list(a.values) for a in found.grid.axes}})
        return 0
    print("\n".join(names))
    if len(found) > len(names):
        print(f"and {len(found) - len(names):,} more")
    return 0


def _evaluate(found, function, out: Path, name, best, metric, resume, force, yes, quiet, as_json) -> int:
    from peta_fast.cli._errors import Interrupted, warn
    from peta_fast.cli._text import print_json

    def tell(point: Any, done: int) -> None:
        if not quiet:
            print(f"peta-fast: {done:,} of {len(found):,}: {_line(point)}", file=sys.stderr, flush=True)

    try:
        results = found.evaluate(
            function, out, best=best, metric=metric, name=name, resume=resume, force=force, yes=yes, tell=tell
        )
    except KeyboardInterrupt:
        if out.exists():
            raise Interrupted from None
        raise
    if not (out / "results.png").exists():
        warn("no picture was drawn: pip install matplotlib, or no point has a score")
    if results.failed:
        warn(f"{len(results.failed):,} of {len(results.points):,} points failed, see {out / 'results.csv'}")
    if as_json:
        print_json(results.to_json())
    else:
        print(f"{len(results.points):,} points in {out / 'results.csv'}")
        if results.best:
            print(f"best: {_line(results.best)}")
    return 1 if len(results.failed) == len(results.points) else 0


def _line(point: Any) -> str:
    parameters = " ".join(f"{key}={value}" for key, value in point.parameters.items())
    scores = " ".join(f"{key}={value:.6g}" for key, value in point.scores.items())
    return f"{parameters}: {point.error.splitlines()[0] if point.error else scores}"
