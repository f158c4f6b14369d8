"""The merges of the demonstration: five methods, and the recipe file of each, in mergekit's shape.

Every method that scales the merged task vector gets the same grid; the validation split picks from it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

SCALINGS = tuple(round(0.1 * tenths, 1) for tenths in range(2, 21))
"""0.2, 0.3, ..., 2.0: what validation picks from."""

QUICK_SCALINGS = (0.3, 0.6, 1.0, 1.5)


@dataclass(frozen=True)
class Merge:
    """A merge method as this demonstration sets it.

    name     of the method
    about    one line for the recipe's head
    keys     recipe keys besides weight and scaling
    scaled   whether there is a base and a task vector to be scaled
    """

    name: str
    about: str
    keys: Mapping[str, float] = field(default_factory=dict)
    scaled: bool = True


MERGES = (
    Merge("linear", "Average of the four fine-tunes.", scaled=False),
    Merge("task_arithmetic", "The sum of the task vectors, scaled, on top of the base."),
    Merge("ties", "The largest fifth of each task vector; the majority's sign wins.", {"density": 0.2}),
    Merge("dare_ties", "A random half of each task vector, rescaled; the majority's sign wins.", {"density": 0.5}),
    Merge("breadcrumbs", "Task vectors without their largest 1 % and smallest 20 %.", {"density": 0.79, "gamma": 0.01}),
)


def recipe_text(merge: Merge, base: Path, models: Sequence[Path], scaling: float | None) -> str:
    """The YAML of one merge. Model folders are written as given, so relative ones hold where the demo was run."""
    lines = [f"# {merge.about}", f"merge_method: {merge.name}"]
    if merge.scaled:
        lines.append(f"base_model: {_reference(base)}")
    lines.append("models:")
    for model in models:
        lines += [f"  - model: {_reference(model)}", "    parameters:", "      weight: 1.0"]
    settings = dict(merge.keys) | ({} if scaling is None else {"lambda": scaling})
    if settings:
        lines += ["parameters:", *(f"  {key}: {value}" for key, value in settings.items())]
    return "\n".join([*lines, "dtype: float32", ""])


def _reference(folder: Path) -> str:
    """The folder as a YAML scalar that nobody takes for a hub id."""
    text = folder.as_posix() if folder.is_absolute() else f"./{folder.as_posix()}"
    return text if re.fullmatch(r"[\w./-]+", text) else yaml.safe_dump(text, width=10**6).splitlines()[0]
