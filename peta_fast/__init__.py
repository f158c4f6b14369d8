"""Merging and linearized fine-tuning at the cost of reading the inputs and writing the output."""

from __future__ import annotations

import importlib

_PUBLIC = {
    "merge": "peta_fast.merging",
    "merge_state_dicts": "peta_fast.merging",
    "load_recipe": "peta_fast.recipe",
    "make_plan": "peta_fast.plan",
    "open_checkpoint": "peta_fast.formats",
    "LinearizedLoRALinear": "peta_fast.nn",
    "LinearizedModel": "peta_fast.nn",
    "add_adapters": "peta_fast.nn",
    "delinearize": "peta_fast.nn",
    "disable_adapter": "peta_fast.nn",
    "group_projections": "peta_fast.nn",
    "linearize": "peta_fast.nn",
    "load_adapter": "peta_fast.nn",
    "register": "peta_fast.nn",
    "save_adapter": "peta_fast.nn",
    "set_adapter": "peta_fast.nn",
    "task_vector": "peta_fast.nn",
    "PetaFastError": "peta_fast.errors",
    "RecipeError": "peta_fast.errors",
    "CheckpointError": "peta_fast.errors",
    "CompatibilityError": "peta_fast.errors",
    "ResourceError": "peta_fast.errors",
}
"""Public name -> the module it comes from, imported when it is first asked for."""

__version__ = "0.1.0"
__all__ = sorted(_PUBLIC)


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'peta_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_PUBLIC]
