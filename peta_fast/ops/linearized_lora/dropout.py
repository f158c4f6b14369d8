"""Dropout whose mask is a function of a seed and the element's place, so that it is drawn again and never stored.

    word(i, j) = word j % 4 of Philox4x32-10 with key = seed, counter = i · ceil(columns / 4) + j // 4
    kept where word >> 8 < ceil((1 - p) · 2^24);  D(x) = x / (1 - p) where kept, else 0

The same mask on every device, whatever the tiles. The seed comes from torch's generator of x's device, which
non-reentrant checkpointing rewinds. Cost: 120 integer operations on a fourth of the elements.
Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
LOW = 0xFFFFFFFF
CHUNK = 1 << 16
"""Counters at a time: the eight arrays of a chunk stay in the cache."""


def draw_seed(device: torch.device) -> Tensor:
    """int64 [], from torch's default generator of that device."""
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)


def keep_threshold(dropout: float) -> int:
    """Kept are the words that, without their lowest 8 bits, lie below it."""
    return math.ceil((1.0 - dropout) * 2.0**24)


def keep_factors(seed: Tensor, rows: int, columns: int, dropout: float, dtype: torch.dtype) -> Tensor:
    """[rows, columns] of dtype: 1 / (1 - dropout) where an element is kept, 0 elsewhere."""
    blocks = -(-columns // 4)
    step = max(1, CHUNK // max(blocks, 1))
    pieces = [
        kept_words(seed, torch.arange(first * blocks, min(first + step, rows) * blocks, device=seed.device), dropout)
        for first in range(0, max(rows, 1), step)
    ]
    kept = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
    factors = kept.reshape(rows, 4 * blocks)[:, :columns].to(dtype)
    return factors * (1.0 / (1.0 - dropout) if dropout < 1.0 else 0.0)


def kept_words(seed: Tensor, counters: Tensor, dropout: float) -> Tensor:
    """counters int64 [n] -> bool [n, 4]"""
    words = philox4x32_10(seed, counters)
    return torch.stack([word >> 8 for word in words], -1) < keep_threshold(dropout)


def philox4x32_10(seed: Tensor, counters: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """seed int64 [], counters int64 [n] -> four words of 32 bits, each int64 [n].

    A product of two words may wrap around in int64; its bits are those of the unsigned product.
    """
    c0, c1 = counters & LOW, counters >> 32 & LOW
    c2, c3 = torch.zeros_like(counters), torch.zeros_like(counters)
    key0, key1 = seed & LOW, seed >> 32 & LOW
    for _ in range(10):
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product1 >> 32 ^ c1 ^ key0) & LOW,
            product1 & LOW,
            (product0 >> 32 ^ c3 ^ key1) & LOW,
            product0 & LOW,
        )
        key0, key1 = key0 + WEYL[0] & LOW, key1 + WEYL[1] & LOW
    return c0, c1, c2, c3
