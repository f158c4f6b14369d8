"""Tensors taken as they are from one model: stacks layers of several models (slices), scales them if asked."""

from __future__ import annotations

from dataclasses import dataclass

from peta_fast.methods import MethodParams, TensorSpec, per_model
from peta_fast.methods._terms import terms
from peta_fast.ops.delta_merge import All, DeltaMerge

REFERENCE = "https://github.com/arcee-ai/mergekit"
COMPAT = ("native", "mergekit")
NEEDS_BASE = False


@dataclass(frozen=True)
class Params(MethodParams):
    scale: tuple[float, ...] = per_model(1.0, help="multiplies the tensor")


def check(params: Params, compat: str) -> list[str]:
    return [] if len(params.scale) == 1 else [f"takes exactly one model a slice, got {len(params.scale)}"]


def lower(params: Params, tensor: TensorSpec) -> DeltaMerge:
    return DeltaMerge(terms(params.scale, [All()]), base="zero")
