"""Linearized LoRA as autograd.Functions: reverse mode of any order, forward mode, and vmap.

Both return u = D(x) A0ᵀ besides their results. It is an output, not a value saved on the side, so that a second
derivative finds its way through it to x, which with B0 = 0 is not kept.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function

from peta_fast.errors import CompatibilityError
from peta_fast.ops.linearized_lora import dispatch
from peta_fast.ops.linearized_lora.modes import in_forward_ad, in_functorch, tangent_among
from peta_fast.ops.linearized_lora.reference import (
    backward_reference,
    dropout_factors,
    dual_backward_reference,
    forward_reference,
    in_dtype_of,
    rows_of,
    sum_of_outer_products,
)


class LinearizedLoRA(Function):
    """(x, weight, bias, A0, dA, B0, dB, seed, scaling, dropout) -> y, u"""

    @staticmethod
    def forward(x, weight, bias, A0, dA, B0, dB, seed, scaling, dropout):
        return dispatch.forward(x, weight, bias, A0, dA, B0, dB, seed, scaling, dropout)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, A0, dA, B0, dB, seed, ctx.scaling, ctx.dropout = inputs
        ctx.set_materialize_grads(False)
        keeps_x = ctx.needs_input_grad[1] or ctx.needs_input_grad[4]
        ctx.save_for_backward(x if keeps_x else None, output[1], weight, A0, dA, B0, dB, seed)
        if in_forward_ad():
            ctx.save_for_forward(x, output[1], weight, A0, dA, B0, dB, seed)

    @staticmethod
    def backward(ctx, gy, gu):
        x, u, weight, A0, dA, B0, dB, seed = ctx.saved_tensors
        needs = (*ctx.needs_input_grad[:3], ctx.needs_input_grad[4], ctx.needs_input_grad[6])
        gx, gweight, gbias, gdA, gdB = gradients(
            gy, gu, x, u, weight, A0, dA, B0, dB, seed, ctx.scaling, ctx.dropout, needs
        )
        return gx, gweight, gbias, None, gdA, None, gdB, None, None, None

    @staticmethod
    def jvp(ctx, dx, dweight, dbias, dA0, ddA, dB0, ddB, *_):
        x, u, weight, A0, dA, B0, dB, seed = ctx.saved_tensors
        if dA0 is not None or dB0 is not None:
            raise CompatibilityError(
                "linearized_lora",
                f"{'A0' if dB0 is None else 'B0'} carries a tangent, but the linearization point is fixed",
                "Differentiate along dA and dB instead.",
            )
        if dx is None:
            dx = torch.zeros_like(x)
        dy, du = LinearizedLoRA.apply(dx, weight, None, A0, dA, B0, dB, seed, ctx.scaling, ctx.dropout)
        B0, ddA, ddB = in_dtype_of(x, B0, ddA, ddB)
        if dweight is not None:
            dy = dy + x @ dweight.t()
        if dbias is not None:
            dy = dy + dbias
        if ddB is not None:
            dy = dy + ctx.scaling * (u @ ddB.t())
        if ddA is not None:
            factors = dropout_factors(x, seed, ctx.dropout)
            dropped = x if factors is None else x * factors
            dy = dy + ctx.scaling * (dropped @ ddA.t() @ B0.t())
        return dy, du

    @staticmethod
    def vmap(info, in_dims, x, *others):
        *tensors, scaling, dropout = others
        if all(d is None for d in in_dims[1:]) and tensors[-1] is None:
            return LinearizedLoRA.apply(x.movedim(in_dims[0], 0), *others), (0, 0)
        present = [i for i, t in enumerate((x, *tensors)) if t is not None]
        everything = (x, *tensors)

        def one(*values: Tensor) -> tuple[Tensor, Tensor]:
            given = [None] * len(everything)
            for place, value in zip(present, values, strict=True):
                given[place] = value
            *arguments, seed = given
            return forward_reference(*arguments, scaling, dropout_factors(given[0], seed, dropout))

        batched = torch.vmap(one, tuple(in_dims[i] for i in present), randomness=info.randomness)
        return batched(*(everything[i] for i in present)), (0, 0)


def gradients(gy, gu, x, u, weight, A0, dA, B0, dB, seed, scaling, dropout, needs):
    """Those of x, weight, bias, dA, dB, by kernel where nobody differentiates or batches the backward itself."""
    looked_into = torch.is_grad_enabled() or in_functorch() or tangent_among((gy, x, u, weight, A0, dA, B0, dB))
    if gy is None or gu is not None or looked_into:
        factors = None
        if seed is not None:
            rows = u.shape[:-1]
            factors = dropout_factors(u.new_empty(1).expand(*rows, weight.shape[1]), seed, dropout)
        return backward_reference(gy, gu, x, u, weight, A0, dA, B0, dB, scaling, factors, needs)
    of_adapter = (needs[0], needs[3], needs[4])
    gx, gdA, gdB = dispatch.backward(gy, x, u, weight, A0, dA, B0, dB, seed, scaling, dropout, of_adapter)
    gweight = sum_of_outer_products(gy, x) if needs[1] else None
    gbias = rows_of(gy).sum(0) if needs[2] else None
    return gx, gweight, gbias, gdA, gdB


class Dual(Function):
    """(x, dx, weight, bias, A0, dA, B0, dB, scaling) -> y0, dy, u"""

    @staticmethod
    def forward(x, dx, weight, bias, A0, dA, B0, dB, scaling):
        return dispatch.dual(x, dx, weight, bias, A0, dA, B0, dB, scaling)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, dx, weight, bias, A0, dA, B0, dB, ctx.scaling = inputs
        ctx.set_materialize_grads(False)
        keeps_x = ctx.needs_input_grad[2] or ctx.needs_input_grad[5]
        kept_dx = dx if ctx.needs_input_grad[2] else None
        ctx.save_for_backward(x if keeps_x else None, kept_dx, output[2], weight, A0, dA, B0, dB)

    @staticmethod
    def backward(ctx, gy0, gdy, gu):
        x, dx, u, weight, A0, dA, B0, dB = ctx.saved_tensors
        needs = (*ctx.needs_input_grad[:4], ctx.needs_input_grad[5], ctx.needs_input_grad[7])
        gx, gdx, gweight, gbias, gdA, gdB = dual_backward_reference(
            gy0, gdy, gu, x, dx, u, weight, A0, dA, B0, dB, ctx.scaling, needs
        )
        return gx, gdx, gweight, gbias, None, gdA, None, gdB, None
