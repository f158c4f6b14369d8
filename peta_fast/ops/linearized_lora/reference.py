"""Linearized LoRA in plain PyTorch: the closed form, and torch.func.jvp over a LoRA layer as its yardstick.

    y  = x W0ᵀ + b + s · [u dBᵀ + t B0ᵀ],   u = D(x) A0ᵀ,   t = D(x) (A0 + dA)ᵀ = u + D(x) dAᵀ
    y0 = x W0ᵀ + b + s · u B0ᵀ
    dy = dx W0ᵀ + s · [(dx A0ᵀ + x dAᵀ) B0ᵀ + u dBᵀ]

With B0 = 0, given as dA = B0 = None, the terms with B0 are left out. B0 + dB is never rounded as a sum: in bf16 a small
dB would vanish in it. Every function here is made of differentiable operations out of place, so it has derivatives of
every order, forward and reverse, and batches under vmap.
Cost beyond x W0ᵀ: 4·M·r·(in + out) flops, with B0 = 0 half of that; the jvp takes three products with W0.
Source: Tang et al., ICLR 2024, arXiv:2310.04742; equations 4 and 5.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from peta_fast.ops.linearized_lora.dropout import keep_factors


def forward_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A0: Tensor,
    dA: Tensor | None,
    B0: Tensor | None,
    dB: Tensor,
    scaling: float,
    factors: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x [*, in], weight [out, in], bias [out] -> y [*, out], u [*, r].

    A0, dA   [r, in]   of any floating dtype, taken to x's
    B0, dB   [out, r]  likewise
    factors  [*, in]   what dropout multiplies x by on its way to the adapter, or None
    """
    A0, dA, B0, dB = in_dtype_of(x, A0, dA, B0, dB)
    dropped = x if factors is None else x * factors
    u = linear(dropped, A0)
    low_rank = linear(u, dB)
    if dA is not None:
        low_rank = low_rank + linear(u + linear(dropped, dA), B0)
    return torch.add(linear(x, weight, bias), low_rank, alpha=scaling), u


def backward_reference(
    gy: Tensor | None,
    gu: Tensor | None,
    x: Tensor | None,
    u: Tensor,
    weight: Tensor,
    A0: Tensor,
    dA: Tensor | None,
    B0: Tensor | None,
    dB: Tensor,
    scaling: float,
    factors: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients gy [*, out] and gu [*, r] -> those of x, weight, bias, dA, dB, each where `needs` says so, else None.

        v = gy dB + gy B0;   gx = gy W0 + D(s (v A0 + gy B0 dA));   gdB = s gyᵀ u;   gdA = s (gy B0)ᵀ D(x)

    x may be None where neither weight nor dA wants a gradient. gu is there in a second derivative only.
    """
    if gy is None:
        gy = u.new_zeros(*u.shape[:-1], weight.shape[0])
    dtype_A, dtype_B = None if dA is None else dA.dtype, dB.dtype
    A0, dA, B0, dB = in_dtype_of(gy, A0, dA, B0, dB)
    at_B0 = None if B0 is None else scaling * (gy @ B0)
    gx = gweight = gbias = gdA = gdB = None
    if needs[0]:
        v = scaling * (gy @ dB)
        v = v if at_B0 is None else v + at_B0
        v = v if gu is None else v + gu
        branch = v @ A0 if dA is None else v @ A0 + at_B0 @ dA
        gx = gy @ weight + (branch if factors is None else branch * factors)
    if needs[1]:
        gweight = sum_of_outer_products(gy, x)
    if needs[2]:
        gbias = rows_of(gy).sum(0)
    if needs[3]:
        gdA = sum_of_outer_products(at_B0, x if factors is None else x * factors).to(dtype_A)
    if needs[4]:
        gdB = (scaling * sum_of_outer_products(gy, u)).to(dtype_B)
    return gx, gweight, gbias, gdA, gdB


def dual_reference(
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
    """x, dx [*, in] -> y0, dy [*, out], u [*, r]; dx None is a zero tangent."""
    A0, dA, B0, dB = in_dtype_of(x, A0, dA, B0, dB)
    u = linear(x, A0)
    y0, low_rank = linear(x, weight, bias), linear(u, dB)
    if dA is not None:
        y0 = torch.add(y0, linear(u, B0), alpha=scaling)
        moved = linear(x, dA) if dx is None else linear(x, dA) + linear(dx, A0)
        low_rank = low_rank + linear(moved, B0)
    dy = scaling * low_rank
    return y0, dy if dx is None else linear(dx, weight) + dy, u


def dual_backward_reference(
    gy0: Tensor | None,
    gdy: Tensor | None,
    gu: Tensor | None,
    x: Tensor | None,
    dx: Tensor | None,
    u: Tensor,
    weight: Tensor,
    A0: Tensor,
    dA: Tensor | None,
    B0: Tensor | None,
    dB: Tensor,
    scaling: float,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of y0, dy [*, out] and u [*, r] -> those of x, dx, weight, bias, dA, dB where `needs` says so.

    gdx = gdy W0 + s gdy B0 A0;   gx = gy0 W0 + s [gy0 B0 A0 + gdy B0 dA + gdy dB A0]
    gdB = s gdyᵀ u;   gdA = s (gdy B0)ᵀ x
    """
    zero = u.new_zeros(*u.shape[:-1], weight.shape[0])
    gy0, gdy = zero if gy0 is None else gy0, zero if gdy is None else gdy
    dtype_A, dtype_B = None if dA is None else dA.dtype, dB.dtype
    A0, dA, B0, dB = in_dtype_of(gdy, A0, dA, B0, dB)
    at_B0 = None if B0 is None else scaling * (gdy @ B0)
    gx = gdx = gweight = gbias = gdA = gdB = None
    if needs[0]:
        v = scaling * (gdy @ dB)
        v = v if gu is None else v + gu
        v = v if B0 is None else v + scaling * (gy0 @ B0)
        gx = gy0 @ weight + v @ A0
        gx = gx if dA is None else gx + at_B0 @ dA
    if needs[1]:
        gdx = gdy @ weight if at_B0 is None else gdy @ weight + at_B0 @ A0
    if needs[2]:
        gweight = sum_of_outer_products(gy0, x)
        gweight = gweight if dx is None else gweight + sum_of_outer_products(gdy, dx)
    if needs[3]:
        gbias = rows_of(gy0).sum(0)
    if needs[4]:
        gdA = sum_of_outer_products(at_B0, x).to(dtype_A)
    if needs[5]:
        gdB = (scaling * sum_of_outer_products(gdy, u)).to(dtype_B)
    return gx, gdx, gweight, gbias, gdA, gdB


def in_dtype_of(x: Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
    dtype = x.dtype
    return [t if t is None or t.dtype == dtype else t.to(dtype) for t in tensors]


def rows_of(x: Tensor) -> Tensor:
    """[*, n] -> [rows, n]; a vector is one row. The number of rows is counted, since -1 means nothing where n = 0."""
    return x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])


def sum_of_outer_products(a: Tensor, b: Tensor) -> Tensor:
    """a [*, n], b [*, k] -> aᵀ b [n, k]"""
    return rows_of(a).t() @ rows_of(b)


def dropout_factors(x: Tensor, seed: Tensor | None, dropout: float) -> Tensor | None:
    """What multiplies x on its way to the adapter, shaped as x; None without dropout."""
    if seed is None:
        return None
    return keep_factors(seed, x.shape[:-1].numel(), x.shape[-1], dropout, x.dtype).reshape(x.shape)


class PlainLoRA(nn.Module):
    """A LoRA layer without anything linear about it: y = x Wᵀ + b + s · D(x) Aᵀ Bᵀ.

    weight [out, in] and bias [out] are frozen; lora_A [r, in] and lora_B [out, r] are parameters.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float, dropout: float = 0.0):
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.lora_A = nn.Parameter(A.detach().clone())
        self.lora_B = nn.Parameter(B.detach().clone())
        self.scaling = scaling
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        low_rank = linear(linear(self.dropout(x), self.lora_A), self.lora_B)
        return linear(x, self.weight, self.bias) + self.scaling * low_rank


class JvpReference(nn.Module):
    """A layer's first-order expansion in all its parameters around their values when it was wrapped, by torch.func.jvp.

        y = f(x; p0) + J(p0) (p - p0)

    Keeps a second copy of every parameter, base weight included, and multiplies by the base weight three times. This is
    how linearized LoRA is usually written; it serves tests and benchmarks as the yardstick.
    """

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer
        self.start = nn.ParameterList(nn.Parameter(p.detach().clone(), requires_grad=False) for p in layer.parameters())

    def forward(self, x: Tensor) -> Tensor:
        y0, dy = self.dual(x)
        return y0 + dy

    def dual(self, x: Tensor, dx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """f(x; p0), and its derivative along (dx, p - p0)."""
        names = [name for name, _ in self.layer.named_parameters()]
        start = tuple(self.start)
        step = tuple(p - p0 for p, p0 in zip(self.layer.parameters(), start, strict=True))

        def function(x: Tensor, *values: Tensor) -> Tensor:
            return torch.func.functional_call(self.layer, dict(zip(names, values, strict=True)), (x,))

        if dx is None:
            return torch.func.jvp(lambda *values: function(x, *values), start, step)
        return torch.func.jvp(function, (x, *start), (dx, *step))
