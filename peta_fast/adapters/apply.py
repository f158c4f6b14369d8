"""Adapters into a base, shard by shard: a recipe whose models are the base with one adapter each.

    one adapter, no method    W + s B A, and its whole tensors in the place of the base's
    several, or a method      W + method(s_1 B_1 A_1, .., s_T B_T A_T), by default their weighted sum

fp32, ranks ascending, one rounding, in the streaming engine: bounded memory, resumable, published whole or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from peta_fast.errors import RecipeError
from peta_fast.formats.hub import locate
from peta_fast.formats.lora_adapter import open_adapter
from peta_fast.merging import merge
from peta_fast.recipe import ModelRef, load_recipe
from peta_fast.run import Progress, Report


def apply_adapters(
    base: str | Path,
    adapters: Sequence[str | Path],
    out: str | Path,
    *,
    method: str | None = None,
    weights: Sequence[Any] | None = None,
    compat: str | None = None,
    max_memory: str | int = "768MB",
    max_shard_size: str | int = "5GB",
    threads: int = 0,
    resume: bool = False,
    force: bool = False,
    allow_nonfinite: bool = False,
    progress: Callable[[Progress], None] | None = None,
    **parameters: Any,
) -> Report:
    """Writes the base with the adapters in it to the folder `out`, as `peta-fast adapter apply` does.

        apply_adapters("base", ["math", "code"], "merged", weights=[0.6, 0.4])
        apply_adapters("base", ["math", "code"], "merged", method="ties", density=0.2)

    method      None: the sum of the changes; else any method of recipes that merges task vectors
    weights     one an adapter: a number, a list (a gradient over the layers), or a list of {filter, value}
    parameters  the method's keys, and the recipe's: dtype, out_dtype, seed, trim_scope

    Raises RecipeError, CheckpointError, CompatibilityError (a key that matches nothing, another base's shapes) or
    ResourceError; nothing appears in `out` then.
    """
    recipe = load_recipe(apply_recipe(base, adapters, method=method, weights=weights, **parameters), compat=compat)
    return merge(
        recipe, out, max_memory=max_memory, max_shard_size=max_shard_size, threads=threads, resume=resume, force=force,
        allow_nonfinite=allow_nonfinite, progress=progress,
    )  # fmt: skip


def apply_recipe(
    base: str | Path,
    adapters: Sequence[str | Path],
    *,
    method: str | None = None,
    weights: Sequence[Any] | None = None,
    **parameters: Any,
) -> dict[str, Any]:
    """The recipe that applying these adapters is.

    A sum with one weight an adapter is one model with a list of adapters: passed through, nothing else is read. Where
    adapters replace whole tensors, a weighted sum of them is that of their differences from the base.
    """
    if isinstance(adapters, str | Path) or not adapters:
        raise RecipeError("adapters", f"expected a list of at least one adapter, got {adapters!r}")
    if weights is not None and len(weights) != len(adapters):
        raise RecipeError("weights", f"expected {len(adapters)}, one an adapter, got {len(weights)}")
    top = {key: parameters.pop(key) for key in TOP_KEYS if key in parameters}
    weights = [1.0] * len(adapters) if weights is None else list(weights)
    if method is None and not parameters and all(isinstance(w, int | float) for w in weights):
        if weights == [1.0] or not any(_opened(adapter).replaced for adapter in adapters):
            listed = [f"{adapter}*{float(w)!r}" for adapter, w in zip(adapters, weights, strict=True)]
            return {"method": "passthrough", "models": [{"model": [str(base), *listed]}], **top}
    models = [{"model": [str(base), str(adapter)]} for adapter in adapters]
    for model, weight in zip(models, weights, strict=True):
        model["parameters"] = {"weight": weight}
    return {
        "method": method or "task_arithmetic",
        "base_model": str(base),
        "models": models,
        "parameters": parameters,
        **top,
    }


TOP_KEYS = ("dtype", "out_dtype", "seed", "trim_scope", "tokenizer_source", "chat_template", "name")


def _opened(adapter: str | Path):
    ref = ModelRef.parse(str(adapter))
    return open_adapter(locate(ref.path, ref.revision))
