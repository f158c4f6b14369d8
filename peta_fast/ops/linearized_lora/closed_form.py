"""The closed form with its sums in place: what runs where no kernel does, and nothing looks at the steps.

The numbers of reference.py, with the adapter's product added into the base product by the matrix multiplication itself
and the products with both halves of an adapter taken at once: one pass over x, one over y.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from peta_fast.ops.linearized_lora.reference import dropout_factors, in_dtype_of, rows_of


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A0: Tensor,
    dA: Tensor | None,
    B0: Tensor | None,
    dB: Tensor,
    seed: Tensor | None,
    scaling: float,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """x [*, in] -> y [*, out], u [*, r], both contiguous."""
    A0, dA, B0, dB = in_dtype_of(x, A0, dA, B0, dB)
    rows = rows_of(x)
    dropped = rows if seed is None else rows * dropout_factors(rows, seed, dropout)
    y = linear(rows, weight, bias)
    if dA is None:
        u = linear(dropped, A0)
        y.addmm_(u, dB.t(), alpha=scaling)
    else:
        u_and_t = dropped @ torch.cat((A0, dA)).t()
        u = u_and_t[:, : A0.shape[0]].contiguous()
        u_and_t[:, A0.shape[0] :] += u
        y.addmm_(u_and_t, torch.cat((dB, B0), 1).t(), alpha=scaling)
    return shaped_as(x, y), shaped_as(x, u)


def backward(
    gy: Tensor,
    x: Tensor | None,
    u: Tensor,
    weight: Tensor,
    A0: Tensor,
    dA: Tensor | None,
    B0: Tensor | None,
    dB: Tensor,
    seed: Tensor | None,
    scaling: float,
    dropout: float,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """gy [*, out] -> the gradients of x, dA and dB, each where `needs` (of these three) says so, else None."""
    dtype_A, dtype_B = None if dA is None else dA.dtype, dB.dtype
    A0, dA, B0, dB = in_dtype_of(gy, A0, dA, B0, dB)
    g = rows_of(gy)
    gx = gdA = gdB = None
    if needs[0]:
        gx = g @ weight
    if dA is None:
        v, adapter = (g @ dB if needs[0] else None), A0
    elif needs[0] or needs[1]:
        v, adapter = g @ torch.cat((B0, dB), 1), torch.cat((dA, A0))
        if needs[1]:
            gdA = _dA_gradient(v[:, : A0.shape[0]], rows_of(x), seed, scaling, dropout).to(dtype_A)
        v[:, A0.shape[0] :] += v[:, : A0.shape[0]]
    if needs[0]:
        if seed is None:
            gx.addmm_(v, adapter, alpha=scaling)
        else:
            gx.addcmul_(v @ adapter, dropout_factors(gx, seed, dropout), value=scaling)
        gx = shaped_as(gy, gx)
    if needs[2]:
        gdB = (g.t() @ rows_of(u)).mul_(scaling).to(dtype_B)
    return gx, gdA, gdB


def _dA_gradient(at_B0: Tensor, x: Tensor, seed: Tensor | None, scaling: float, dropout: float) -> Tensor:
    """at_B0 [rows, r] = gy B0, x [rows, in] -> s (gy B0)ᵀ D(x)"""
    dropped = x if seed is None else x * dropout_factors(x, seed, dropout)
    return (at_B0.t() @ dropped).mul_(scaling)


def dual(
    x: Tensor,
    dx: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    A0: Tensor,
    dA: Tensor | None,
    B0: Tensor | None,
    dB: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """x, dx [*, in] -> y0, dy [*, out], u [*, r], all contiguous; dx None is a zero tangent."""
    A0, dA, B0, dB = in_dtype_of(x, A0, dA, B0, dB)
    rows, moving = rows_of(x), None if dx is None else rows_of(dx)
    u = rows @ A0.t()
    y0 = linear(rows, weight, bias)
    dy = (u @ dB.t()).mul_(scaling) if moving is None else (moving @ weight.t()).addmm_(u, dB.t(), alpha=scaling)
    if dA is not None:
        t = rows @ dA.t() if moving is None else (moving @ A0.t()).addmm_(rows, dA.t())
        y0.addmm_(u, B0.t(), alpha=scaling)
        dy.addmm_(t, B0.t(), alpha=scaling)
    return shaped_as(x, y0), shaped_as(x, dy), shaped_as(x, u)


def dual_backward(
    gy0: Tensor | None,
    gdy: Tensor,
    x: Tensor | None,
    u: Tensor,
    weight: Tensor,
    A0: Tensor,
    dA: Tensor | None,
    B0: Tensor | None,
    dB: Tensor,
    scaling: float,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """gy0 (None for zero), gdy [*, out] -> the gradients of x, dx, dA, dB, each where `needs` says so, else None.

    Of gdy one product with [dB | B0], of gy0 one with B0; what they give meets [A0; dA] inside gx.
    """
    dtype_A, dtype_B = None if dA is None else dA.dtype, dB.dtype
    A0, dA, B0, dB = in_dtype_of(gdy, A0, dA, B0, dB)
    r, g, g0 = A0.shape[0], rows_of(gdy), None if gy0 is None else rows_of(gy0)
    gx = gdx = gdA = gdB = v = v0 = None
    if needs[0]:
        v = g @ (dB if B0 is None else torch.cat((dB, B0), 1))
        v0 = None if B0 is None else v[:, r:]
    elif B0 is not None and (needs[1] or needs[2]):
        v0 = g @ B0
    if needs[1]:
        gdx = g @ weight
        gdx = gdx if v0 is None else gdx.addmm_(v0, A0, alpha=scaling)
    if needs[2]:
        gdA = (v0.t() @ rows_of(x)).mul_(scaling).to(dtype_A)
    if needs[0]:
        if g0 is not None and B0 is not None:
            v[:, :r].addmm_(g0, B0)
        down = A0 if dA is None else torch.cat((A0, dA))
        gx = (v @ down).mul_(scaling) if g0 is None else (g0 @ weight).addmm_(v, down, alpha=scaling)
    if needs[3]:
        gdB = (g.t() @ rows_of(u)).mul_(scaling).to(dtype_B)
    return None if gx is None else shaped_as(gdy, gx), None if gdx is None else shaped_as(gdy, gdx), gdA, gdB


def shaped_as(x: Tensor, rows: Tensor) -> Tensor:
    """rows [rows, n] -> [*, n] for x [*, k]"""
    return rows if x.dim() == 2 else rows.reshape(*x.shape[:-1], rows.shape[1])
