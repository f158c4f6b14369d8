"""Models without what their task vectors share, for methods of every other kind: TIES, AdaMerging, Concrete after AWD.

    model_t' = model_t - delta,   delta = sum_s a_s (model_s - base)

`method: awd` is task arithmetic of these, without writing them. Each of them is itself task arithmetic of the T models,
with weights 1 - a_t for its own and -a_s for the others.
Source: Xiong et al., 2024, arXiv:2411.18729.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from peta_fast._engine import Engine
from peta_fast.errors import RecipeError
from peta_fast.merging import MemorySource, merge, merge_state_dicts
from peta_fast.ops.weight_disentanglement import Disentanglement, disentangle
from peta_fast.plan import make_plan, plan_tensors
from peta_fast.recipe import ModelRef, Recipe, load_recipe


def disentangle_state_dicts(
    base: Mapping[str, Any],
    models: Sequence[Mapping[str, Any]],
    *,
    alpha: float = 0.1,
    learning_rate: float = 0.01,
    iterations: int = 300,
    dtype: Any = None,
    threads: int = 0,
) -> tuple[list[dict[str, Any]], Disentanglement]:
    """The T models without delta, as whole state dicts, and what the descent found.

    dtype  of the new models; the base's, tensor by tensor, when not given: one rounding each
    Raises RecipeError for fewer than two models, CompatibilityError for names and shapes, CheckpointError for NaN.
    """
    labels = [f"model {t}" for t in range(len(models))]
    recipe = _recipe("base", labels)
    states = {"base": base, **dict(zip(labels, models, strict=True))}
    sources = {ModelRef(label): MemorySource(label, state) for label, state in states.items()}
    engine = Engine(recipe, plan_tensors(recipe, sources, None), sources, None, threads=threads)
    engine.find_model_statistics()
    found = disentangle(engine.gram, alpha=alpha, learning_rate=learning_rate, iterations=iterations)
    settings = {"method": "task_arithmetic", "dtype": dtype, "threads": threads}
    return [merge_state_dicts(base, models, weight=weights, **settings) for weights in _own_weights(found)], found


def disentangle_checkpoints(
    base: str | Path,
    models: Sequence[str | Path],
    out: str | Path,
    *,
    alpha: float = 0.1,
    learning_rate: float = 0.01,
    iterations: int = 300,
    threads: int = 0,
    **settings: Any,
) -> tuple[list[Path], Disentanglement]:
    """The same on disk: folders `out/0`, `out/1`, ... and what the descent found.

    settings  as `merge` takes them: dtype, force, max_memory, ...
    Costs one reading of everything, and another one for each model that is written.
    """
    recipe = _recipe(str(base), [str(model) for model in models])
    plan = make_plan(recipe)
    engine = Engine(plan.recipe, plan.tensors, plan.sources, None, threads=threads)
    engine.find_model_statistics()
    found = disentangle(engine.gram, alpha=alpha, learning_rate=learning_rate, iterations=iterations)
    folders = [Path(out) / str(t) for t in range(len(models))]
    for folder, weights in zip(folders, _own_weights(found), strict=True):
        merge(
            out=folder, method="task_arithmetic", base=base, models=models, weight=weights, threads=threads, **settings
        )
    return folders, found


def _recipe(base: str, models: Sequence[str]) -> Recipe:
    if len(models) < 2:
        raise RecipeError("models", f"expected two models or more, got {len(models)}")
    listed = [{"model": model} for model in models]
    return load_recipe({"method": "awd", "base_model": base, "models": listed, "parameters": {"weight": 1.0}})


def _own_weights(found: Disentanglement) -> list[list[float]]:
    """One row a model: weights of the T task vectors that add up to its own without delta."""
    return (np.eye(len(found.coefficients)) - found.coefficients).tolist()
