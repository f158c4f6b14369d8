"""Gram matrices X^T X: accumulated in fp32, packed, with their off-diagonal elements scaled.

    packed: row 0 from its diagonal on, row 1 from its diagonal on, ...    n (n + 1) / 2 values

Cost of adding m rows: m n^2 flops - the blocks below the diagonal are left out - against reading 4 m n bytes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BLOCK = 512
"""Columns of a block: few enough to leave out nearly half of the products, enough for each to be a fast one."""


def packed_size(side: int) -> int:
    return side * (side + 1) // 2


def side_of(size: int) -> int:
    """n of a packed triangle. Raises ValueError when no triangle has that many values."""
    side = (math.isqrt(8 * size + 1) - 1) // 2
    if packed_size(side) != size:
        raise ValueError(f"expected n (n + 1) / 2 values of a packed Gram matrix, got {size}")
    return side


def pack(gram: Tensor) -> Tensor:
    """[n, n] -> [n (n + 1) / 2]: the upper triangle, row by row; what lies below it is not looked at."""
    if not len(gram):
        return gram.reshape(0)
    return torch.cat([row[i:] for i, row in enumerate(gram)])


def unpack(packed: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """[n (n + 1) / 2] -> [n, n], symmetric. Raises ValueError when no triangle has that many values."""
    side = side_of(packed.numel())
    full = torch.empty(side, side, dtype=dtype or packed.dtype, device=packed.device)
    begin = 0
    for i in range(side):
        row = packed[begin : begin + side - i]
        full[i, i:] = row
        full[i:, i] = row
        begin += side - i
    return full


def add_gram(total: Tensor, rows: Tensor) -> None:
    """Adds rows^T rows to the upper triangle of `total`, in place, in total's dtype.

    total  [n, n]  what lies below the diagonal blocks is left as it is
    rows   [*, n]  any floating dtype
    """
    rows = rows.reshape(-1, rows.shape[-1]).to(total.dtype)
    for i in range(0, total.shape[0], BLOCK):
        total[i : i + BLOCK, i:].addmm_(rows[:, i : i + BLOCK].T, rows[:, i:])


def scale_off_diagonal(gram: Tensor, factor: float) -> Tensor:
    """[n, n] -> factor G + (1 - factor) diag(G), in place."""
    if factor != 1.0:
        diagonal = gram.diagonal().clone()
        gram.mul_(factor).diagonal().copy_(diagonal)
    return gram
