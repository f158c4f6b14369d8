"""The random keep masks of DARE and DELLA: Philox4x32-10, keyed by seed, model position and tensor name.

    key  = first 8 bytes of BLAKE2b("seed \\0 position \\0 name"), two little-endian words
    u_i  = (word i % 4 of the block with counter i // 4) >> 8, times 2^-24;  kept where u_i < fp32(p_i)

Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def keep_mask(seed: int, position: int, name: str, probability: Tensor) -> Tensor:
    """bool [*S]: u < fp32(p), element by element in flat order."""
    u = uniforms(seed, position, name, probability.numel())
    return (torch.from_numpy(u) < probability.float().flatten()).reshape(probability.shape)


def uniforms(seed: int, position: int, name: str, n: int) -> np.ndarray:
    """fp32 [n] in [0, 1), multiples of 2^-24: element i is word i % 4 of block i // 4."""
    digest = hashlib.blake2b(f"{seed}\0{position}\0{name}".encode()).digest()[:8]
    blocks = np.arange((n + 3) // 4, dtype=np.uint64)
    counters = np.stack([blocks & 0xFFFFFFFF, blocks >> 32, 0 * blocks, 0 * blocks])
    words = philox4x32_10(counters, np.frombuffer(digest, dtype="<u4"))
    return (words.T.reshape(-1)[:n] >> 8).astype(np.float32) * np.float32(2.0**-24)


def philox4x32_10(counters: np.ndarray, key: Sequence[int]) -> np.ndarray:
    """counters [4, n], key [2] -> random words [4, n], all of 32 bits held in uint64.

    Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011.
    """
    c0, c1, c2, c3 = (np.asarray(c, dtype=np.uint64) for c in counters)
    key0, key1 = int(key[0]), int(key[1])
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(10):
        product0, product1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (product1 >> half) ^ c1 ^ np.uint64(key0),
            product1 & low,
            (product0 >> half) ^ c3 ^ np.uint64(key1),
            product0 & low,
        )
        key0, key1 = (key0 + 0x9E3779B9) & 0xFFFFFFFF, (key1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3])
