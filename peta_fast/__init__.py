"""Merging and linearized fine-tuning at the cost of reading the inputs and writing the output."""

from __future__ import annotations

import importlib

_PUBLIC = {
    "merge": "peta_fast.merging",
    "merge_state_dicts": "peta_fast.merging",
    "merge_batch": "peta_fast.batches",
    "sweep": "peta_fast.sweeps",
    "load_recipe": "peta_fast.recipe",
    "make_plan": "peta_fast.plan",
    "open_checkpoint": "peta_fast.formats",
    "apply_adapters": "peta_fast.adapters.apply",
    "export_adapter": "peta_fast.adapters.export",
    "extract_adapter": "peta_fast.adapters.extract",
    "merge_adapters": "peta_fast.adapters.merge",
    "Task": "peta_fast.fit.tasks",
    "adamerging": "peta_fast.fit.adamerging",
    "concrete_adamerging": "peta_fast.fit.concrete",
    "concrete_task_arithmetic": "peta_fast.fit.concrete",
    "LinearizedLoRALinear": "peta_fast.nn",
    "LinearizedModel": "peta_fast.nn",
    "TangentModel": "peta_fast.nn",
    "TrainedTensors": "peta_fast.formats.trained_only",
    "add_adapters": "peta_fast.nn",
    "attention_only": "peta_fast.nn",
    "delinearize": "peta_fast.nn",
    "disable_adapter": "peta_fast.nn",
    "disentangle_checkpoints": "peta_fast.disentangling",
    "disentangle_state_dicts": "peta_fast.disentangling",
    "extract_trained": "peta_fast.nn",
    "group_projections": "peta_fast.nn",
    "linearize": "peta_fast.nn",
    "load_adapter": "peta_fast.nn",
    "load_trained": "peta_fast.nn",
    "register": "peta_fast.nn",
    "save_adapter": "peta_fast.nn",
    "save_trained": "peta_fast.nn",
    "set_adapter": "peta_fast.nn",
    "task_vector": "peta_fast.nn",
    "trained_tensors": "peta_fast.nn",
    "Statistics": "peta_fast.fit",
    "collect_statistics": "peta_fast.fit",
    "load_statistics": "peta_fast.fit",
    "regmean_pp": "peta_fast.fit",
    "tune": "peta_fast.ops.linearized_lora.tuning",
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
    if name == "analysis":
        return importlib.import_module("peta_fast.analysis")
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'peta_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_PUBLIC]
