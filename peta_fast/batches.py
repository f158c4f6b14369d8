"""The verb that merges by many recipes at once: a YAML stream of named recipes, each into a folder of its own.

Recipes that start from the same model and whose outputs have the same tensors share every reading of their inputs; all
run within one bound of memory. A recipe that fails stops alone, and is told of at the end. A model that bears another
recipe's name is what comes out of that one, which goes first.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from peta_fast._run_variants import Outcome, run_all
from peta_fast.errors import CheckpointError, PetaFastError, RecipeError
from peta_fast.merging import parse_bytes
from peta_fast.plan import Plan, make_plan
from peta_fast.recipe import ModelRef, Recipe, SliceSpec, load_recipes
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
    options = {"max_memory": memory, "resume": resume, "force": force, "allow_nonfinite": allow_nonfinite}
    options |= {"threads": threads, "progress": progress}
    found: dict[str, Outcome] = {}
    needs = needs_of(named)
    for wave in _waves(needs):
        plans: list[tuple[str, Plan, Path]] = []
        for name, recipe in ((name, recipe) for name, recipe in named if name in wave):
            target = Path(out) / name
            try:
                _refuse_failed(name, [found[other] for other in needs[name]])
                made = {other: str(found[other].out) for other in needs[name]}
                plan = make_plan(_located(recipe, made), max_memory=memory, max_shard_size=shard, threads=threads)
                plans.append((name, plan, target))
            except PetaFastError as error:
                found[name] = Outcome(name, target, None, error)
        found.update((outcome.name, outcome) for outcome in run_all(plans, **options))
    return [found[name] for name, _ in named]


def needs_of(named: Sequence[tuple[str, Recipe]]) -> dict[str, list[str]]:
    """By recipe, the recipes whose results it merges: models that bear their names, and are no path of their own."""
    names = {name for name, _ in named}
    return {
        name: [ref.path for ref in recipe.references() if ref.path in names and not os.path.exists(ref.path)]
        for name, recipe in named
    }


def _waves(needs: Mapping[str, Sequence[str]]) -> Iterator[list[str]]:
    """Recipes whose needs are met, again and again. Raises RecipeError, before the first, when some need each other."""
    waves: list[list[str]] = []
    done: set[str] = set()
    while len(done) < len(needs):
        wave = [name for name in needs if name not in done and done.issuperset(needs[name])]
        if not wave:
            left = ", ".join(repr(name) for name in needs if name not in done)
            raise RecipeError(
                "name", f"{left} need each other's results", "A recipe's name that is a model's goes first."
            )
        waves.append(wave)
        done.update(wave)
    yield from waves


def _refuse_failed(name: str, needed: Sequence[Outcome]) -> None:
    failed = [outcome.name for outcome in needed if outcome.error is not None]
    if failed:
        raise CheckpointError(name, f"needs what {', '.join(map(repr, failed))} should have made, which failed")


def _located(recipe: Recipe, made: Mapping[str, str]) -> Recipe:
    """The recipe with the folders of results where it has their names."""
    if not made:
        return recipe

    def ref(given: ModelRef | None) -> ModelRef | None:
        return replace(given, path=made[given.path]) if given is not None and given.path in made else given

    def of_slice(piece: SliceSpec) -> SliceSpec:
        sources = tuple(replace(s, model=ref(s.model)) for s in piece.sources)
        return replace(piece, sources=sources, base=ref(piece.base))

    modules = tuple(replace(m, slices=tuple(map(of_slice, m.slices))) for m in recipe.modules)
    return replace(recipe, base=ref(recipe.base), modules=modules)


def _refuse_names(names: Sequence[str]) -> None:
    """Names become folders."""
    wrong = [n for n in names if n in (".", "..") or "/" in n or "\0" in n or len(n.encode()) > 200]
    if wrong:
        raise RecipeError("name", f"expected names that can be folders, got {', '.join(map(repr, wrong[:3]))}")
    if len(set(names)) < len(names):
        raise RecipeError("name", "expected names that differ, so that each recipe has a folder of its own")
