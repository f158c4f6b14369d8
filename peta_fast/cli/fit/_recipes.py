"""Recipes that merge with what has been learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peta_fast.errors import ResourceError

METHODS = {"output_gram": "mats", "input_gram": "regmean", "fisher": "fisher", "fisher_gram": "mats"}
"""Kind of statistics -> the method that makes most of it, the richest first."""


def of_statistics(method: str, models: Sequence[str], files: Sequence[Path], **parameters: Any) -> dict[str, Any]:
    """The recipe that solves with statistics in files."""
    entries = [
        {"model": model, "parameters": {"statistics": str(file)}} for model, file in zip(models, files, strict=True)
    ]
    recipe: dict[str, Any] = {"method": method, "models": entries}
    return recipe | ({"parameters": parameters} if parameters else {})


def as_yaml(recipe: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(dict(recipe), sort_keys=False, width=1 << 20)


def refuse_existing(paths: Sequence[Path | None], force: bool) -> None:
    """Raises ResourceError where one is there and not to be replaced."""
    there = [path for path in paths if path is not None and path.exists()]
    if there and not force:
        raise ResourceError(str(there[0]), "is there already", "Use --force to replace it, or another name.")


def write_recipe(path: Path, recipe: Mapping[str, Any]) -> None:
    """Whole or not at all. Raises ResourceError."""
    from peta_fast.formats.disk import make_directory, write_whole

    make_directory(path.parent)
    write_whole(path, as_yaml(recipe).encode())
