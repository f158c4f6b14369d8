"""`peta-fast adapter apply`: adapters into a base, shard by shard."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from peta_fast.cli._adapters import Density, Set, Weights
from peta_fast.cli._options import All, AsJson, Compat, Limit, MaxMemory, MaxShardSize, Seed, Threads
from peta_fast.cli._parser import Argument, Option
from peta_fast.cli._text import ROWS


def apply(
    base: Annotated[str, Argument("BASE", "the model's folder or hub id")],
    adapters: Annotated[list[str], Argument("ADAPTER", "adapters' folders or hub ids")],
    out: Annotated[Path | None, Option("--out", help="Folder for what comes out.")] = None,
    method: Annotated[str | None, Option("--method", help="ties, dare_ties, ...; the sum unless given.")] = None,
    weights: Weights = None,
    density: Density = None,
    settings: Set = None,
    dtype: Annotated[str | None, Option("--dtype", help="Of the output; the base's unless given.")] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Print the plan and write nothing.")] = False,
    resume: Annotated[bool, Option("--resume", help="Go on with a killed run.")] = False,
    force: Annotated[bool, Option("--force", help="Replace a checkpoint in OUT.")] = False,
    max_memory: MaxMemory = "768MB",
    max_shard_size: MaxShardSize = "5GB",
    threads: Threads = 0,
    compat: Compat = None,
    seed: Seed = None,
    allow_nonfinite: Annotated[bool, Option("--allow-nonfinite", help="NaN and infinities are no fault.")] = False,
    quiet: Annotated[bool, Option("--quiet/--no-quiet", "-q", help="No progress on stderr.")] = False,
    as_json: AsJson = False,
    limit: Limit = ROWS,
    show_all: All = False,
) -> int:
    """Apply LoRA adapters to a base: a merged checkpoint, one rounding, in bounded memory."""
    from peta_fast.adapters.apply import apply_recipe
    from peta_fast.cli._adapters import keys, numbers, required_out
    from peta_fast.cli._errors import warn
    from peta_fast.cli._planning import shard_bytes
    from peta_fast.cli.merge import run_plan
    from peta_fast.merging import parse_bytes
    from peta_fast.plan import make_plan
    from peta_fast.recipe import load_recipe

    top = {key: value for key, value in (("dtype", dtype), ("seed", seed)) if value is not None}
    recipe = apply_recipe(
        base, adapters, method=method, weights=numbers(weights, "--weights"), **keys(settings, density), **top
    )
    plan = make_plan(
        load_recipe(recipe, compat=compat), max_memory=parse_bytes(max_memory, "--max-memory"),
        max_shard_size=shard_bytes(max_shard_size), threads=threads,
    )  # fmt: skip
    for warning in plan.warnings:
        warn(warning)
    if dry_run:
        from peta_fast.cli._plan_text import print_plan

        print_plan(plan, as_json, None if show_all else limit)
        return 0
    run_plan(plan, required_out(out), resume, force, allow_nonfinite, threads, quiet, as_json)
    return 0
