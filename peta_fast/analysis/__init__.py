"""Why merging works, and where it does not: task vectors, disentanglement, landscapes, score curves; as PNG, CSV, HTML.

`measure` costs one reading of the checkpoints. All others evaluate merged models, made one after another in one place.
Names are resolved when they are first asked for; matplotlib is imported when the first picture is drawn.
"""

from __future__ import annotations

import importlib

_PUBLIC = {
    "Figure": "figures",
    "choose_addition": "coefficients",
    "choose_negation": "coefficients",
    "disentanglement_error": "disentanglement",
    "lambda_curves": "scores",
    "linearization_error": "linearization",
    "loss_landscape": "landscape",
    "measure": "task_vectors",
    "measure_state_dicts": "task_vectors",
    "negate": "coefficients",
    "score_curves": "scores",
    "write_figures": "page",
}
"""Public name -> the module of this folder it comes from."""

__all__ = sorted(_PUBLIC)


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'peta_fast.analysis' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_PUBLIC]
