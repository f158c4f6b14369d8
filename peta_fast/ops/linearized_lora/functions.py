"""Linearized LoRA as autograd.Functions: reverse mode of any order, forward mode, and vmap.

Functions with setup_context, which functorch asks for, cost 24 µs more a call (PyTorch binds their arguments by
inspect.signature); where no transform and no forward AD is active, the Eager ones run the same code without it.
All return u = D(x) A0ᵀ besides their results. It is an output, not a value saved on the side, so that a second
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


class EagerLinearizedLoRA(Function):
    """As LinearizedLoRA, for reverse mode alone."""

    @staticmethod
    def forward(ctx, *inputs):
        output = dispatch.forward(*inputs)
        LinearizedLoRA.setup_context(ctx, inputs, output)
        return output

    backward = LinearizedLoRA.backward


def gradients(gy, gu, x, u, weight, A0, dA, B0, dB, seed, scaling, dropout, needs):
    """Those of x, weight, bias, dA, dB, by kernel where nobody differentiates or batches the backward itself."""
    if gy is None or gu is not None or looked_into((gy, x, u, weight, A0, dA, B0, dB)):
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


def looked_into(tensors) -> bool:
    """Whether somebody differentiates or batches a backward of these tensors, so that no kernel may run."""
    return torch.is_grad_enabled() or in_functorch() or tangent_among(tensors)


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
        gx, gdx, gweight, gbias, gdA, gdB = dual_gradients(
            gy0, gdy, gu, x, dx, u, weight, A0, dA, B0, dB, ctx.scaling, needs, dispatch.dual_backward
        )
        return gx, gdx, gweight, gbias, None, gdA, None, gdB, None


class EagerDual(Function):
    """As Dual, for reverse mode alone."""

    @staticmethod
    def forward(ctx, *inputs):
        output = dispatch.dual(*inputs)
        Dual.setup_context(ctx, inputs, output)
        return output

    backward = Dual.backward


def dual_gradients(gy0, gdy, gu, x, dx, u, weight, A0, dA, B0, dB, scaling, needs, of_adapter):
    """Those of x, dx, weight, bias, dA, dB; by of_adapter where nobody looks into the backward itself."""
    everything = (gy0, gdy, x, dx, u, weight, A0, dA, B0, dB)
    if gdy is None or gu is not None or looked_into(everything):
        return dual_backward_reference(gy0, gdy, gu, x, dx, u, weight, A0, dA, B0, dB, scaling, needs)
    wanted = [needs[0], needs[1], needs[4], needs[5]]
    gx, gdx, gdA, gdB = of_adapter(gy0, gdy, x, u, weight, A0, dA, B0, dB, scaling, wanted)
    gweight = gbias = None
    if needs[2]:
        gweight = torch.zeros_like(weight) if gy0 is None else sum_of_outer_products(gy0, x)
        gweight = gweight if dx is None else gweight + sum_of_outer_products(gdy, dx)
    if needs[3]:
        gbias = gdy.new_zeros(weight.shape[0]) if gy0 is None else rows_of(gy0).sum(0)
    return gx, gdx, gweight, gbias, gdA, gdB
