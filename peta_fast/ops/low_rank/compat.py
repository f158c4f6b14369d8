"""PEFT's `linear` combination of adapters: the factors are added up, not their products.

    A = sum_t sgn(w_t s_t) sqrt|w_t s_t| A_t,   B = sum_t sqrt|w_t s_t| B_t
    B A = sum_t w_t s_t B_t A_t + sum_{i != j} sgn(w_j s_j) sqrt|w_i s_i w_j s_j| B_i A_j          the cross terms

Source: PEFT 0.21.2, LoraModel.add_weighted_adapter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from peta_fast.ops.low_rank.algebra import LowRank


def shares(weights: Sequence[float]) -> tuple[list[float], list[float]]:
    """What PEFT multiplies every A and every B by, for weights that have the scalings in them already."""
    roots = [math.sqrt(abs(w)) for w in weights]
    return [root if w >= 0 else -root for root, w in zip(roots, weights, strict=True)], roots


def linear_peft(factors: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float]) -> LowRank:
    """factors: (B_t [m, r], A_t [r, n]) without their scalings; weights: w_t s_t. Sums in fp64, rounded once.

    Raises ValueError where ranks or shapes differ.
    """
    if len({(B.shape, A.shape) for B, A in factors}) != 1:
        raise ValueError(f"linear needs adapters of one rank, got {[A.shape[0] for _, A in factors]}")
    for_A, for_B = shares(weights)
    A = sum(w * A.double() for w, (_, A) in zip(for_A, factors, strict=True))
    B = sum(w * B.double() for w, (B, _) in zip(for_B, factors, strict=True))
    return LowRank(B.to(factors[0][0].dtype), A.to(factors[0][1].dtype))
