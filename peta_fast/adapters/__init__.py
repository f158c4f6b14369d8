"""Adapters in, adapters or models out: merging, applying, extracting and exporting LoRA without a dense model.

Names are imported when they are asked for: applying adapters needs numpy and the native module alone.
"""

from __future__ import annotations

import importlib

_VERBS = {
    "apply_adapters": "peta_fast.adapters.apply",
    "export_adapter": "peta_fast.adapters.export",
    "extract_adapter": "peta_fast.adapters.extract",
    "merge_adapters": "peta_fast.adapters.merge",
}
__all__ = sorted(_VERBS)


def __getattr__(name: str):
    if name in _VERBS:
        return getattr(importlib.import_module(_VERBS[name]), name)
    raise AttributeError(f"module 'peta_fast.adapters' has no attribute {name!r}")
