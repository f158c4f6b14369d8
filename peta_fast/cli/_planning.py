"""From the command line's options to a plan."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path

from peta_fast.cli._errors import warn
from peta_fast.merging import parse_bytes
from peta_fast.plan import Plan, make_plan
from peta_fast.recipe import Recipe, load_recipe, load_recipes

_MERGEKIT_SIZE = re.compile(r"(\d+)([KMB])")
_MERGEKIT_UNITS = {"K": "KB", "M": "MB", "B": "GB"}


def planned(
    recipe: Path | Recipe,
    compat: str | None,
    seed: int | None,
    max_memory: str,
    max_shard_size: str,
    threads: int,
    cache: str | None = None,
    trained_only: bool = False,
) -> Plan:
    """The plan of a recipe, or of a recipe's file; its warnings are printed. cache: where downloaded models lie.

    Raises RecipeError, CheckpointError, CompatibilityError or ResourceError.
    """
    if cache is not None:
        os.environ["HF_HUB_CACHE"] = cache
    plan = make_plan(
        _loaded(recipe, compat, seed),
        max_memory=parse_bytes(max_memory, "--max-memory"),
        max_shard_size=shard_bytes(max_shard_size),
        threads=threads,
        trained_only=trained_only,
    )
    for warning in plan.warnings:
        warn(warning)
    return plan


def shard_bytes(text: str) -> int:
    """Bytes of a file; K, M and B (billion) alone are how mergekit counts bytes. Raises RecipeError."""
    match = _MERGEKIT_SIZE.fullmatch(text.strip())
    return parse_bytes(match[1] + _MERGEKIT_UNITS[match[2]] if match else text, "--max-shard-size")


def loaded_all(path: Path, compat: str | None, seed: int | None) -> list[tuple[str, Recipe]]:
    """Every recipe of a file with its name. Raises RecipeError."""
    return [(name, _changed(recipe, compat, seed)) for name, recipe in load_recipes(path, compat=compat)]


def _loaded(path: Path | Recipe, compat: str | None, seed: int | None) -> Recipe:
    return path if isinstance(path, Recipe) else _changed(load_recipe(path, compat=compat), compat, seed)


def _changed(recipe: Recipe, compat: str | None, seed: int | None) -> Recipe:
    """The recipe; its text, which goes into the model card, says what the command line changed."""
    changes = [f"--{key} {value}" for key, value in (("compat", compat), ("seed", seed)) if value is not None]
    if not changes:
        return recipe
    text = f"{recipe.text.rstrip()}\n# run with {' '.join(changes)}\n"
    return dataclasses.replace(recipe, seed=recipe.seed if seed is None else seed, text=text)
