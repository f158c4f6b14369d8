"""Adapters in, adapters or models out: merging, applying, extracting and exporting LoRA without a dense model."""

from __future__ import annotations

from peta_fast.adapters.apply import apply_adapters
from peta_fast.adapters.export import export_adapter
from peta_fast.adapters.extract import extract_adapter
from peta_fast.adapters.merge import merge_adapters

__all__ = ["apply_adapters", "export_adapter", "extract_adapter", "merge_adapters"]
