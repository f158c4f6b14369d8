"""Adaptive weight disentanglement: task arithmetic without the vector that all task vectors share.

    base + scaling * sum w (model - base - delta),   delta = sum_t a_t (model_t - base)

Without delta, what is left is nearly orthogonal. It is found by gradient descent on T coefficients, from the inner
products of the whole task vectors, which cost one reading of the inputs. Since delta is dropped, the weights want to be
larger than task arithmetic's. The cosines do not depend on the task vectors' lengths, but alpha and learning_rate do:
where the task vectors are much longer than 1 / alpha, next to nothing is taken away.

Source: Xiong et al., 2024. Its code is not public: plain gradient descent is what the paper describes.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from peta_fast.methods import REQUIRED, MethodParams, TensorSpec, per_model, shared
from peta_fast.methods._terms import terms
from peta_fast.ops.delta_merge import All, DeltaMerge
from peta_fast.ops.weight_disentanglement import Disentanglement, disentangle

REFERENCE = "https://arxiv.org/abs/2411.18729"
COMPAT = ("native",)
STATISTICS = ("model-gram",)


@dataclass(frozen=True)
class Params(MethodParams):
    weight: tuple[float, ...] = per_model(REQUIRED, help="multiplies each disentangled task vector")
    alpha: float = shared(0.1, low=0.0, help="price of the length of what is taken away")
    learning_rate: float = shared(0.01, low=0.0, help="of the descent")
    iterations: int = shared(300, low=0, kind=int, help="of the descent")
    scaling: float = shared(1.0, alias="lambda", help="multiplies the merged task vector")


def check(params: Params, compat: str) -> list[str]:
    if len(params.weight) < 2:
        return [f"awd takes at least 2 models, got {len(params.weight)}"]
    return []


def lower(params: Params, tensor: TensorSpec) -> DeltaMerge:
    found = _disentangled(tensor.gram.tobytes(), params.alpha, params.learning_rate, params.iterations)
    weights = [float(w) for w in found.weights(params.weight)]
    return DeltaMerge(terms(weights, [All()] * tensor.models), scaling=params.scaling)


@functools.lru_cache(maxsize=16)
def _disentangled(gram: bytes, alpha: float, learning_rate: float, iterations: int) -> Disentanglement:
    """Once for all tensors of a model."""
    inner = np.frombuffer(gram)
    return disentangle(
        inner.reshape([int(len(inner) ** 0.5)] * 2), alpha=alpha, learning_rate=learning_rate, iterations=iterations
    )
