"""The closed form with its sums in place: what runs where no kernel does, and nothing looks at the steps.

The numbers of reference.py, with the adapter's product added into the base product by the matrix multiplication itself
and the products with both halves of an adapter taken at once: one pass over x, one over y.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from peta_fast.ops.linearized_lora.reference import dropout_factors, dual_reference, in_dtype_of, rows_of


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
        u = dropped @ A0.t()
        y.addmm_(u, dB.t(), alpha=scaling)
    else:
        u_and_t = dropped @ torch.cat((A0, dA)).t()
        u = u_and_t[:, : A0.shape[0]].contiguous()
        u_and_t[:, A0.shape[0] :] += u
        y.addmm_(u_and_t, torch.cat((dB, B0), 1).t(), alpha=scaling)
    return y.reshape(*x.shape[:-1], y.shape[1]), u.reshape(*x.shape[:-1], u.shape[1])


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
        gx = gx.reshape(*gy.shape[:-1], gx.shape[-1])
    if needs[2]:
        gdB = (g.t() @ rows_of(u)).mul_(scaling).to(dtype_B)
    return gx, gdA, gdB


def _dA_gradient(at_B0: Tensor, x: Tensor, seed: Tensor | None, scaling: float, dropout: float) -> Tensor:
    """at_B0 [rows, r] = gy B0, x [rows, in] -> s (gy B0)ᵀ D(x)"""
    dropped = x if seed is None else x * dropout_factors(x, seed, dropout)
    return (at_B0.t() @ dropped).mul_(scaling)


def dual(x, dx, weight, bias, A0, dA, B0, dB, scaling):
    """y0, dy [*, out], u [*, r]"""
    return dual_reference(x, dx, weight, bias, A0, dA, B0, dB, scaling)
