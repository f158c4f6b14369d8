"""The closed form of several projections of one x, with its sums in place: what runs where no kernel does.

All down-projections that see the same D(x) are one product; the gradient of x grows in one tensor, to which the matrix
multiplications add. Sums are in another order than those of the single layers: equal to rounding, not bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from peta_fast.ops.linearized_lora.reference import dropout_factors, in_dtype_of, rows_of


class Part(NamedTuple):
    """One projection; dA and B0 None say that B0 = 0, seed None that nothing is dropped."""

    weight: Tensor
    bias: Tensor | None
    A0: Tensor
    dA: Tensor | None
    B0: Tensor | None
    dB: Tensor
    seed: Tensor | None
    scaling: float
    dropout: float

    @property
    def general(self) -> bool:
        return self.dA is not None

    def adapter_of(self, x: Tensor) -> list[Tensor | None]:
        """A0, dA, B0, dB in the dtype of x"""
        return in_dtype_of(x, self.A0, self.dA, self.B0, self.dB)


Gradients = tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]
"""Of x, of every dA, of every dB."""


def forward(x: Tensor, parts: Sequence[Part]) -> tuple[list[Tensor], list[Tensor]]:
    """x [*, in] -> of every part y [*, out] and u = D(x) A0ᵀ [*, r], contiguous."""
    rows, shape = rows_of(x), x.shape[:-1]
    downs = [torch.cat([a for a in part.adapter_of(x)[:2] if a is not None]) for part in parts]
    ys, us = [], []
    for part, h in zip(parts, down_projections(rows, parts, downs), strict=True):
        y = linear(rows, part.weight, part.bias)
        us.append(up_projected(y, h, part).reshape(*shape, part.A0.shape[0]))
        ys.append(y.reshape(*shape, y.shape[1]))
    return ys, us


def down_projections(rows: Tensor, parts: Sequence[Part], downs: Sequence[Tensor]) -> list[Tensor]:
    """D(x) [rows, in] times each [r or 2r, in], transposed: those without dropout as one product."""
    together = [i for i, part in enumerate(parts) if part.seed is None]
    found: list[Tensor] = [rows] * len(parts)
    if together:
        product = rows @ torch.cat([downs[i] for i in together]).t()
        for i, columns in zip(together, product.split([downs[i].shape[0] for i in together], 1), strict=True):
            found[i] = columns
    for i, part in enumerate(parts):
        if part.seed is not None:
            found[i] = (rows * dropout_factors(rows, part.seed, part.dropout)) @ downs[i].t()
    return found


def up_projected(y: Tensor, h: Tensor, part: Part) -> Tensor:
    """Adds the adapter's part to y [rows, out]; h [rows, r or 2r] = D(x) [A0; dA]ᵀ, of which u is returned."""
    _, _, B0, dB = part.adapter_of(y)
    r = part.A0.shape[0]
    u = h[:, :r].contiguous()
    if B0 is None:
        y.addmm_(u, dB.t(), alpha=part.scaling)
    else:
        h[:, r:] += u
        y.addmm_(h, torch.cat((dB, B0), 1).t(), alpha=part.scaling)
    return u


def backward(
    gys: Sequence[Tensor | None],
    x: Tensor | None,
    us: Sequence[Tensor],
    parts: Sequence[Part],
    needs_x: bool,
    needs_dA: Sequence[bool],
    needs_dB: Sequence[bool],
) -> Gradients:
    """gys [*, out], None where an output has none -> the gradients that are asked for, else None.

        v = s gy [B0 | dB];   gx = sum_i gy_i W0_i + D_i(v_i [dA_i + A0_i; A0_i]);   gdA = v0ᵀ D(x);   gdB = s gyᵀ u

    x may be None where no dA wants a gradient.
    """
    gx, ups, downs, free = None, [], [], [None if g is None else rows_of(g) for g in gys]
    gdAs: list[Tensor | None] = [None] * len(parts)
    gdBs: list[Tensor | None] = [None] * len(parts)
    dropped = []
    for i, (part, g) in enumerate(zip(parts, free, strict=True)):
        if g is None:
            continue
        A0, dA, B0, dB = part.adapter_of(g)
        if needs_x:
            gx = g @ part.weight if gx is None else gx.addmm_(g, part.weight)
        if needs_dB[i]:
            gdBs[i] = (g.t() @ rows_of(us[i])).mul_(part.scaling).to(part.dB.dtype)
        if needs_x or needs_dA[i]:
            v = (g @ (dB if B0 is None else torch.cat((B0, dB), 1))).mul_(part.scaling)
            adapter = A0
            if dA is not None:
                v0 = v[:, : A0.shape[0]]
                if needs_dA[i]:
                    gdAs[i] = dA_gradient(v0, rows_of(x), part)
                v[:, A0.shape[0] :] += v0
                adapter = torch.cat((dA, A0))
            if part.seed is None:
                ups.append(v)
                downs.append(adapter)
            else:
                dropped.append((v, adapter, part))
    if gx is not None:
        if ups:
            gx.addmm_(torch.cat(ups, 1), torch.cat(downs))
        for v, adapter, part in dropped:
            gx.addcmul_(v @ adapter, dropout_factors(gx, part.seed, part.dropout))
        shape = next(g for g in gys if g is not None).shape[:-1]
        gx = gx.reshape(*shape, gx.shape[-1])
    return gx, gdAs, gdBs


def dA_gradient(v0: Tensor, x: Tensor, part: Part) -> Tensor:
    """v0 [rows, r] = s gy B0, x [rows, in] -> v0ᵀ D(x) [r, in]"""
    dropped = x if part.seed is None else x * dropout_factors(x, part.seed, part.dropout)
    return (v0.t() @ dropped).to(part.dA.dtype)
