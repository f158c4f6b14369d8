"""The README.md of a merged model: front matter that the hub reads, and the recipe that made it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence


def model_card(base: str | None, models: Sequence[str], method: str, recipe_text: str) -> str:
    """Text of a README.md.

    base         reference of the base model, None for methods without one
    models       references of the merged models
    method       name of the merge method
    recipe_text  YAML of the recipe, quoted as it is
    """
    references = list(dict.fromkeys([base, *models] if base else models))
    front = ["base_model:", *(f"- {json.dumps(name)}" for name in references)] if references else []
    merged = "\n".join(f"* {_code(name)}" for name in dict.fromkeys(models) if name != base)
    beside = f", with {_code(base)} as base" if base else ""
    fence = "`" * max(3, 1 + _longest_run(recipe_text))
    return "\n".join([
        "---", *front, "tags:", "- peta_fast", "- merge", "---", "",
        "# Merged model", "",
        f"Merged by peta_fast with the method {_code(method)}{beside}.", "",
        "## Models", "", merged, "",
        "## Recipe", "", f"{fence}yaml", recipe_text.strip("\n"), fence, "",
    ])  # fmt: skip


def _code(text: str) -> str:
    fence = "`" * (1 + _longest_run(text))
    return f"{fence}{text}{fence}" if len(fence) == 1 else f"{fence} {text} {fence}"


def _longest_run(text: str) -> int:
    """Length of the longest run of backticks."""
    return max(map(len, re.findall("`+", text)), default=0)
