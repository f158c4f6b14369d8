"""The noise of a mask: a function of a key and the element's place, drawn again in every pass and never stored.

    word(i) = word i % 4 of Philox4x32-10 with counter i // 4;   u = clamp((word >> 8) 2^-24, 2^-23, 1 - 2^-23)

Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peta_fast.ops.delta_merge import philox_key
from peta_fast.ops.linearized_lora.dropout import philox4x32_10

LEAST, MOST = 2, 2**24 - 2
"""u lies between these many 2^-24."""


def mask_key(seed: int, draw: int, name: str) -> int:
    """The key of a tensor's mask: another for every draw and every name. uint64"""
    return philox_key(seed, draw, name)


def uniforms(key: int, begin: int, end: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """[end - begin] of dtype, in (0, 1): those of the elements from begin, which is a multiple of 4, to end."""
    signed = key - (1 << 64) if key >= 1 << 63 else key
    counters = torch.arange(begin // 4, (end + 3) // 4, device=device)
    words = philox4x32_10(torch.tensor(signed, dtype=torch.int64, device=device), counters)
    whole = torch.stack(words, -1).flatten()[: end - begin] >> 8
    return whole.clamp(LEAST, MOST).to(dtype) * 2.0**-24
