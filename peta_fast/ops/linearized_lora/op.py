"""Linearized LoRA as one differentiable operation, and its dual form that carries a tangent beside the value.

    y  = x W0ᵀ + b + s · [(D(x) A0ᵀ) (B0 + dB)ᵀ + (D(x) dAᵀ) B0ᵀ]
    y0 = x W0ᵀ + b + s · (x A0ᵀ) B0ᵀ
    dy = dx W0ᵀ + s · [(dx A0ᵀ + x dAᵀ) B0ᵀ + (x A0ᵀ) dBᵀ]

Cost beyond x W0ᵀ: 4·M·r·(in + out) flops forward, with B0 = 0 half of that; backward twice the forward's. With B0 = 0
and a frozen weight u = D(x) A0ᵀ [M, r] is kept for the backward, not x [M, in]. A frozen weight gets no gradient.
Source: Tang et al., ICLR 2024, arXiv:2310.04742.

Three ways into the same formulas, since each of the others fails somewhere without a word:
- under torch.compile the operators of torch_ops.py, opaque to the tracer; they refuse tangents;
- in eager mode an autograd.Function, inside transforms and forward AD one that knows them, at 24 µs more a call;
- inside a transform that neither of them knows, the differentiable plain form of reference.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peta_fast.ops.linearized_lora import checks, dispatch, torch_ops
from peta_fast.ops.linearized_lora.dropout import draw_seed
from peta_fast.ops.linearized_lora.functions import Dual, EagerDual, EagerLinearizedLoRA, LinearizedLoRA
from peta_fast.ops.linearized_lora.modes import in_forward_ad, in_functorch, tangent_among
from peta_fast.ops.linearized_lora.reference import dropout_factors, dual_reference, forward_reference


def linearized_lora(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A0: Tensor,
    dA: Tensor | None,
    B0: Tensor | None,
    dB: Tensor,
    scaling: float,
    *,
    dropout: float = 0.0,
    training: bool = False,
) -> Tensor:
    """A LoRA layer's first-order expansion around (A0, B0), at the step (dA, dB).

    x        [*, in]    fp64, fp32, bf16 or fp16; any strides
    weight   [out, in]  x's dtype; any strides
    bias     [out]      x's dtype, or None
    A0, dA   [r, in]    any of these dtypes; A0 is fixed
    B0, dB   [out, r]   likewise; dA and B0 both None say that B0 = 0
    scaling  unitless: alpha / r, or alpha / sqrt(r)
    dropout  probability of dropping an element of x on its way to the adapter, while training

    Returns y [*, out] in x's dtype; under torch.autocast x, weight and bias are taken to its dtype. Differentiable in
    x, dA, dB, weight and bias to any order; gradients have the dtype of what they belong to.
    Raises CompatibilityError where shapes, dtypes or devices do not fit.
    """
    x, weight, bias = in_autocast_dtype(x, weight, bias)
    checks.check_arguments("linearized_lora", x, weight, bias, A0, dA, B0, dB)
    checks.check_dropout("linearized_lora", dropout)
    scaling, dropout = float(scaling), float(dropout) if training else 0.0
    seed = draw_seed(x.device) if dropout else None
    if torch.compiler.is_compiling():
        if not in_functorch():
            return torch_ops.forward(x, weight, bias, A0, dA, B0, dB, seed, scaling, dropout)[0]
        factors = dropout_factors(x, seed, dropout)
        return forward_reference(x, weight, bias, A0, dA, B0, dB, scaling, factors)[0]
    if in_functorch() or in_forward_ad():
        return LinearizedLoRA.apply(x, weight, bias, A0, dA, B0, dB, seed, scaling, dropout)[0]
    way = EagerLinearizedLoRA.apply if torch.is_grad_enabled() else dispatch.forward
    return way(x, weight, bias, A0, dA, B0, dB, seed, scaling, dropout)[0]


def linearized_lora_dual(
    x: Tensor,
    dx: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    A0: Tensor,
    dA: Tensor | None,
    B0: Tensor | None,
    dB: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """The layer at (A0, B0), and its derivative along (dx, dA, dB): what linearizing a whole model asks of each layer.

    dx  [*, in]  the tangent of x, None for zero; the other arguments as in linearized_lora

    Returns y0, dy [*, out]. Differentiable in x, dx, dA, dB, weight and bias. Raises CompatibilityError.
    """
    x, weight, bias, dx = in_autocast_dtype(x, weight, bias, dx)
    checks.check_arguments("linearized_lora_dual", x, weight, bias, A0, dA, B0, dB)
    checks.check_tangent("linearized_lora_dual", x, dx)
    scaling = float(scaling)
    if in_functorch() or tangent_among((x, dx, weight, bias, A0, dA, B0, dB)):
        return dual_reference(x, dx, weight, bias, A0, dA, B0, dB, scaling)[:2]
    if torch.compiler.is_compiling():
        return torch_ops.dual(x, dx, weight, bias, A0, dA, B0, dB, scaling)[:2]
    way = Dual if in_forward_ad() else EagerDual
    return way.apply(x, dx, weight, bias, A0, dA, B0, dB, scaling)[:2]


def in_autocast_dtype(x: Tensor, *others: Tensor | None) -> Sequence[Tensor | None]:
    """x and the others as torch.autocast would have a Linear see them. The adapter is left alone: its sums are cast."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return (x, *others)
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in (x, *others))
