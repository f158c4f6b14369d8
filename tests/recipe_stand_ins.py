"""Merge methods and recipes for the tests of recipes, which so do not depend on the keys of the real methods."""

from __future__ import annotations

import contextlib
import sys

import pytest

from peta_fast import methods
from peta_fast.errors import RecipeError
from peta_fast.recipe import load_recipe

HEADER = """
from dataclasses import dataclass
from peta_fast.methods import REQUIRED, MethodParams, per_model, shared

REFERENCE = ""
COMPAT = {compat}
NEEDS_BASE = {needs_base}

@dataclass(frozen=True)
class Params(MethodParams):
"""
WEIGHT = "    weight: tuple = per_model(REQUIRED)"
TIES_KEYS = f"""{WEIGHT}
    density: tuple = per_model(1.0, low=0.0, high=1.0, help="fraction kept")
    normalize: bool = shared(True)
    scaling: float = shared(1.0, alias="lambda")
    rounds: int = shared(3, low=1)
    order: str = shared("first", choices=("first", "all"))
    mask: str = shared(None, kind=str)
"""
METHODS = {
    "stand_in_ties": (("native", "mergekit"), True, TIES_KEYS),
    "stand_in_linear": (("native", "mergekit"), False, WEIGHT),
    "stand_in_slerp": (("native", "mergekit"), False, "    t: float = shared(REQUIRED, kind=float)\n\nMODELS = 2"),
    "stand_in_masked": (("peta", "native"), True, "    density: tuple = per_model(1.0)\n\nSCOPE = {'peta': 'model'}"),
}

TIES = """\
merge_method: stand_in_ties
base_model: base
models:
  - model: a
    parameters: {weight: 1}
  - model: b
    parameters: {weight: 2}
"""


FILTERED = """\
merge_method: stand_in_ties
base_model: base
models:
  - model: a
    parameters:
      weight:
        - filter: self_attn
          value: [0, 1]
        - filter: attn.q
          value: 5
        - filter: mlp
          value: 7
        - value: 0.25
"""

LEVELS = """\
merge_method: stand_in_ties
base_model: base
parameters: {weight: 1, density: 0.1, normalize: false, lambda: [1, 2]}
modules:
  text:
    parameters: {weight: 2, density: 0.2, scaling: 5}
    slices:
      - sources:
          - {model: a, layer_range: [0, 4], parameters: {weight: [{filter: mlp, value: 4}]}}
          - {model: b, layer_range: [0, 4]}
          - {model: base, layer_range: [0, 4]}
        parameters: {weight: [{filter: attn, value: 3}]}
  image:
    models: [{model: a}]
"""

SLICES = """\
merge_method: stand_in_ties
base_model: base
parameters: {weight: 1}
slices:
  - sources:
      - {model: a, layer_range: [0, 24]}
      - {model: base, layer_range: [8, 32]}
  - base_model: other
    sources:
      - {model: b, layer_range: [20, 40]}
"""

ANCHORS = """\
x-common: &common {weight: 0.5, density: 0.25}
x-sparse: &sparse {density: 0.125}
merge_method: stand_in_ties
base_model: &base org/base
models:
  - model: *base
  - {model: a, parameters: *common}
  - {model: b, parameters: {<<: *common, density: 0.75}}
  - {model: c, parameters: {density: 0.75, <<: *common}}
  - {model: d, parameters: {<<: [*sparse, *common]}}
"""


@contextlib.contextmanager
def stand_in_methods(folder):
    """The stand-ins as methods, written into a folder."""
    for name, (compat, needs_base, keys) in METHODS.items():
        (folder / f"{name}.py").write_text(HEADER.format(compat=compat, needs_base=needs_base) + keys)
    methods.__path__.append(str(folder))
    methods.names.cache_clear()
    yield
    methods.__path__.remove(str(folder))
    methods.names.cache_clear()
    for name in METHODS:
        sys.modules.pop(f"peta_fast.methods.{name}", None)


def faults(source, **keywords) -> list[str]:
    """The lines of the RecipeError that a source raises."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(source, **keywords)
    return str(caught.value).split("\n")


def resolve(source, tensor="model.layers.0.mlp.up_proj.weight", t=None, module=0, piece=0):
    """The values of one tensor; source is a Recipe or what load_recipe takes."""
    recipe = load_recipe(source)
    chosen = recipe.modules[module]
    return recipe.resolve(tensor, chosen, chosen.slices[piece], t)


def with_weight(setting: str) -> str:
    """TIES with another weight for model 'a', in line 5."""
    return TIES.replace("weight: 1}", f"weight: {setting}}}")
