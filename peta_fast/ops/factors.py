"""A tensor out of low-rank factors, where it is wanted as a whole: origin + left right, in fp32.

Ranks ascending, each product and sum rounded once (FMA or what equals it), so that the bits are the same everywhere.
2 rank flops an element, 4 bytes written.
"""

from __future__ import annotations

import numpy as np

from peta_fast.buffers import FactorsBuffer
from peta_fast.ops import backend


def formed(buffer: FactorsBuffer, *, threads: int = 0) -> np.ndarray:
    """[buffer.size] fp32."""
    out = np.empty(buffer.size, np.float32)
    backend().form_factors(buffer.record, buffer.size, out, threads)
    return out
