"""The verb that merges by many recipes at once: a YAML stream of named recipes, each into a folder of its own.

Recipes that start from the same model and whose outputs have the same tensors share every reading of their inputs; all
run within one bound of memory. A recipe that fails stops alone, and is told of at the end.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from peta_fast._run_variants import Outcome, run_all
from peta_fast.errors import PetaFastError, RecipeError
from peta_fast.merging import parse_bytes
from peta_fast.plan import Plan, make_plan
from peta_fast.recipe import Recipe, load_recipes
from peta_fast.run import Progress

__all__ = ["Outcome", "merge_batch"]


def merge_batch(
    recipes: str | Path | Sequence[tuple[str, Recipe]],
    out: str | Path,
    *,
    compat: str | None = None,
    max_memory: str | int = "768MB",
    max_shard_size: str | int = "5GB",
    threads: int = 0,
    resume: bool = False,
    force: bool = False,
    allow_nonfinite: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> list[Outcome]:
    """Merges by every recipe of a YAML stream, into out/<name>.

    recipes  path or text of a stream of recipes, told apart by `name`; or (name, Recipe) pairs

    Returns what became of each, in their order: a report, or the error that stopped it alone.
    Raises RecipeError, before any work, for what is wrong with the text of any of them; ResourceError when the disk
    cannot take all.
    """
    named = load_recipes(recipes, compat=compat) if isinstance(recipes, str | os.PathLike) else list(recipes)
    _refuse_names([name for name, _ in named])
    memory = parse_bytes(max_memory, "max_memory")
    shard = parse_bytes(max_shard_size, "max_shard_size")
    plans: list[tuple[str, Plan, Path]] = []
    failed: dict[str, Outcome] = {}
    for name, recipe in named:
        target = Path(out) / name
        try:
            plans.append((name, make_plan(recipe, max_memory=memory, max_shard_size=shard, threads=threads), target))
        except PetaFastError as error:
            failed[name] = Outcome(name, target, None, error)
    done = run_all(
        plans, max_memory=memory, resume=resume, force=force, allow_nonfinite=allow_nonfinite, threads=threads,
        progress=progress,
    )  # fmt: skip
    by_name = {outcome.name: outcome for outcome in done} | failed
    return [by_name[name] for name, _ in named]


def _refuse_names(names: Sequence[str]) -> None:
    """Names become folders."""
    wrong = [n for n in names if n in (".", "..") or "/" in n or "\0" in n or len(n.encode()) > 200]
    if wrong:
        raise RecipeError("name", f"expected names that can be folders, got {', '.join(map(repr, wrong[:3]))}")
    if len(set(names)) < len(names):
        raise RecipeError("name", "expected names that differ, so that each recipe has a folder of its own")
