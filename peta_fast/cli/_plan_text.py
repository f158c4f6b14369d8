"""A plan on stdout, as a table or as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from peta_fast.cli._text import print_facts, print_json, print_table, seconds_text, shape_text, size_text
from peta_fast.plan import Plan


def print_plan(plan: Plan, as_json: bool, limit: int | None) -> None:
    """limit: rows of the table, None for all."""
    if as_json:
        print_json(plan.to_json())
        return
    tensors = [tensor.to_json() for tensor in plan.tensors]
    rows = [[t["action"], t["name"], t["dtype"], shape_text(t["shape"]), _how(t), _from(t)] for t in tensors]
    rows += [["alias", alias, "", "", f"(tied to {name})", ""] for alias, name in plan.aliases.items()]
    print_table(["action", "tensor", "dtype", "shape", "parameters", "sources"], rows, limit=limit)
    print()
    print_facts(_totals(plan))


def _how(tensor: Mapping[str, Any]) -> str:
    settings = (f"{key}={_value(value)}" for key, value in tensor["parameters"].items())
    return " ".join([*settings, *([f"({tensor['reason']})"] if tensor["reason"] else [])])


def _value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_value, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


def _from(tensor: Mapping[str, Any]) -> str:
    """The sources; a source that has the tensor under its own name goes by its path alone."""
    named = [place.removesuffix(f":{tensor['name']}") for place in tensor["models"]]
    base = [tensor["base"].removesuffix(f":{tensor['name']}")] if tensor["base"] else []
    return " <- ".join([*base, " ".join(named)])


def _totals(plan: Plan) -> dict[str, str]:
    recipe = plan.recipe
    actions = Counter(tensor.action for tensor in plan.tensors)
    actions += Counter(alias=len(plan.aliases))
    counts = ", ".join(f"{count} {action}" for action, count in actions.items())
    return {
        "method": f"{recipe.method} (compat {recipe.compat}, seed {recipe.seed})",
        "tensors": f"{counts}; {len(plan.layouts)} file" + "s" * (len(plan.layouts) > 1),
        "reads": size_text(plan.bytes_read),
        "writes": size_text(plan.bytes_written),
        "memory": f"{size_text(plan.peak_memory)} of working memory at most",
        "disk": f"{size_text(plan.disk_needed)} needed",
        "time": f"about {seconds_text(plan.seconds_estimate)}",
    }
