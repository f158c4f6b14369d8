"""Which modules of a model a list of names, a regular expression or a pattern means: PEFT's rules."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping

from torch import nn

from peta_fast.errors import RecipeError
from peta_fast.nn import base_layer

ALL_LINEAR = "all-linear"


def find_targets(model: nn.Module, target_modules: Collection[str] | str) -> dict[str, nn.Module]:
    """Name -> module, in the model's order.

    target_modules  last names or tails of names ("q_proj", "attn.q_proj"); a regular expression that matches whole
                    names; or "all-linear": every Linear but the output embeddings
    Raises RecipeError when a name or the expression matches nothing, with the nearest names.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    if target_modules == ALL_LINEAR:
        return all_linear(model, modules)
    if isinstance(target_modules, str):
        found = {n: m for n, m in modules.items() if re.fullmatch(target_modules, n)}
        missing = [] if found else [target_modules]
    else:
        tails = set(target_modules)
        found = {n: m for n, m in modules.items() if any(is_tail(tail, n) for tail in tails)}
        missing = sorted(tail for tail in tails if not any(is_tail(tail, n) for n in found))
    if missing or not found:
        raise no_match(missing, modules)
    return found


def is_tail(tail: str, name: str) -> bool:
    return name == tail or name.endswith(f".{tail}")


def all_linear(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    found = {n: m for n, m in modules.items() if m is not head and base_layer.is_supported(m)}
    if not found:
        raise RecipeError("target_modules", "'all-linear' matches no module: the model has no Linear", "")
    return found


def no_match(missing: list[str], modules: Mapping[str, nn.Module]) -> RecipeError:
    """Says which names match nothing, and the most similar last names of the Linears that are there."""
    known = sorted({name.rpartition(".")[2] for name, module in modules.items() if base_layer.is_supported(module)})
    near = [n for tail in missing for n in difflib.get_close_matches(tail.rpartition(".")[2], known, n=3, cutoff=0.3)]
    named = ", ".join(f"'{tail}'" for tail in missing)
    listed = ", ".join(map(repr, dict.fromkeys(near or known[:8])))
    return RecipeError(
        "target_modules",
        f"no module matches {named or 'an empty list'}",
        f"The nearest Linear modules are {listed}." if listed else "The model has no Linear.",
    )
