"""Spherical interpolation of two checkpoints, tensor by tensor.

    sin((1 - t) w) / sin w * x0 + sin(t w) / sin w * x1,  cos w = <x0, x1> / (|x0| |x1|)

and linear where |cos w| > 0.9995. The angle is taken in fp64 and the two factors are rounded once. With a base, it is
x0; else x0 is the model listed first. A norm below 1e-8 leaves the angle undefined:

    native    linear
    mergekit  a right angle

Source: Shoemake, SIGGRAPH 1985.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from peta_fast.methods import REQUIRED, MethodParams, TensorSpec, shared
from peta_fast.methods._terms import terms
from peta_fast.ops.delta_merge import All, DeltaMerge

REFERENCE = "https://dl.acm.org/doi/10.1145/325334.325242"
COMPAT = ("native", "mergekit")
NEEDS_BASE = False
STATISTICS = ("gram",)
MODELS = 2

NEARLY_PARALLEL = 0.9995
SMALLEST_NORM = 1e-8


@dataclass(frozen=True)
class Params(MethodParams):
    t: float = shared(REQUIRED, kind=float, help="0 is the base or first model, 1 the other")


def lower(params: Params, tensor: TensorSpec) -> DeltaMerge:
    factors = _factors(params.t, _cosine(tensor.gram, undefined=1.0 if tensor.compat == "native" else 0.0))
    return DeltaMerge(terms(factors, [All(), All()]), base="zero")


def _cosine(gram, undefined: float) -> float:
    norms = math.sqrt(gram[0][0]), math.sqrt(gram[1][1])
    if min(norms) < SMALLEST_NORM:
        return undefined
    return max(-1.0, min(1.0, gram[0][1] / (norms[0] * norms[1])))


def _factors(t: float, cosine: float) -> tuple[float, float]:
    if abs(cosine) > NEARLY_PARALLEL:
        return 1.0 - t, t
    angle = math.acos(cosine)
    return math.sin((1.0 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
