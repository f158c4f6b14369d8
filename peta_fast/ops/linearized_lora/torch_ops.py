"""The operators that torch.compile sees: opaque to the tracer, with shapes for it and gradients for autograd.

    peta_fast::linearized_lora           -> y, u
    peta_fast::linearized_lora_backward  -> gx, gdA, gdB; empty where not asked for
    peta_fast::linearized_lora_dual      -> y0, dy, u
    peta_fast::linearized_lora_dual_backward -> gx, gdx, gdA, gdB; empty where not asked for

They have no derivative in forward mode. PyTorch would give a tangent of zero there, so they refuse tangents.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from peta_fast.errors import CompatibilityError
from peta_fast.ops.linearized_lora import dispatch, functions
from peta_fast.ops.linearized_lora.modes import tangent_among
from peta_fast.ops.linearized_lora.reference import rows_of, sum_of_outer_products

ADAPTER = "Tensor A0, Tensor? dA, Tensor? B0, Tensor dB"
SCHEMAS = {
    "linearized_lora": f"(Tensor x, Tensor weight, Tensor? bias, {ADAPTER}, Tensor? seed, float scaling, float dropout)"
    " -> (Tensor, Tensor)",
    "linearized_lora_backward": f"(Tensor gy, Tensor? x, Tensor u, Tensor weight, {ADAPTER}, Tensor? seed,"
    " float scaling, float dropout, bool[] needs) -> (Tensor, Tensor, Tensor)",
    "linearized_lora_dual": f"(Tensor x, Tensor? dx, Tensor weight, Tensor? bias, {ADAPTER}, float scaling)"
    " -> (Tensor, Tensor, Tensor)",
    "linearized_lora_dual_backward": f"(Tensor? gy0, Tensor gdy, Tensor? x, Tensor u, Tensor weight, {ADAPTER},"
    " float scaling, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)",
}


class Registry(torch.library.Library):
    """A library of operators whose autograd kernels refuse tangents."""

    def impl(self, op_name, fn, dispatch_key="", **options):
        if dispatch_key == "Autograd":
            fn = refusing_tangents(op_name, fn)
        return super().impl(op_name, fn, dispatch_key, **options)


def refusing_tangents(name: str, kernel: Callable) -> Callable:
    @functools.wraps(kernel)
    def guarded(keyset, *arguments, **options):
        if tangent_among(arguments):
            raise CompatibilityError(
                f"peta_fast::{str(name).split('::')[-1]}",
                "an argument carries a tangent, and this operator has no derivative in forward mode",
                "Call peta_fast.ops.linearized_lora.linearized_lora, which has, or linearized_lora_dual.",
            )
        return kernel(keyset, *arguments, **options)

    return guarded


LIBRARY = Registry("peta_fast", "FRAGMENT")
for _name, _schema in SCHEMAS.items():
    LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))


@torch.library.impl(LIBRARY, "linearized_lora", "CompositeExplicitAutograd")
def _forward(x, weight, bias, A0, dA, B0, dB, seed, scaling, dropout):
    return dispatch.forward(x, weight, bias, A0, dA, B0, dB, seed, scaling, dropout)


@torch.library.impl(LIBRARY, "linearized_lora_backward", "CompositeExplicitAutograd")
def _backward(gy, x, u, weight, A0, dA, B0, dB, seed, scaling, dropout, needs):
    found = dispatch.backward(gy, x, u, weight, A0, dA, B0, dB, seed, scaling, dropout, needs)
    return tuple(gy.new_empty(0) if f is None else f.contiguous() for f in found)


@torch.library.impl(LIBRARY, "linearized_lora_dual", "CompositeExplicitAutograd")
def _dual(x, dx, weight, bias, A0, dA, B0, dB, scaling):
    return dispatch.dual(x, dx, weight, bias, A0, dA, B0, dB, scaling)


@torch.library.impl(LIBRARY, "linearized_lora_dual_backward", "CompositeExplicitAutograd")
def _dual_backward(gy0, gdy, x, u, weight, A0, dA, B0, dB, scaling, needs):
    found = dispatch.dual_backward(gy0, gdy, x, u, weight, A0, dA, B0, dB, scaling, needs)
    return tuple(gdy.new_empty(0) if f is None else f.contiguous() for f in found)


@torch.library.register_fake("peta_fast::linearized_lora", lib=LIBRARY)
def _(x, weight, bias, A0, dA, B0, dB, seed, scaling, dropout):
    rows = x.shape[:-1]
    return x.new_empty(*rows, weight.shape[0]), x.new_empty(*rows, A0.shape[0])


@torch.library.register_fake("peta_fast::linearized_lora_backward", lib=LIBRARY)
def _(gy, x, u, weight, A0, dA, B0, dB, seed, scaling, dropout, needs):
    nothing = [gy.new_empty(0) for _ in range(3)]
    found = (
        gy.new_empty(*gy.shape[:-1], weight.shape[1]) if needs[0] else nothing[0],
        torch.empty_like(dA, memory_format=torch.contiguous_format) if needs[1] else nothing[1],
        torch.empty_like(dB, memory_format=torch.contiguous_format) if needs[2] else nothing[2],
    )
    return found


@torch.library.register_fake("peta_fast::linearized_lora_dual", lib=LIBRARY)
def _(x, dx, weight, bias, A0, dA, B0, dB, scaling):
    rows = x.shape[:-1]
    wide = (x.new_empty(*rows, weight.shape[0]) for _ in range(2))
    return (*wide, x.new_empty(*rows, A0.shape[0]))


@torch.library.register_fake("peta_fast::linearized_lora_dual_backward", lib=LIBRARY)
def _(gy0, gdy, x, u, weight, A0, dA, B0, dB, scaling, needs):
    wide = (gdy.new_empty(*gdy.shape[:-1], weight.shape[1]) if n else gdy.new_empty(0) for n in needs[:2])
    narrow = (
        torch.empty_like(t, memory_format=torch.contiguous_format) if n else gdy.new_empty(0)
        for t, n in zip((dA, dB), needs[2:], strict=True)
    )  # fmt: skip
    return (*wide, *narrow)


def _gradients(ctx, gy, gu):
    """As functions.gradients, with the adapter's part as an operator where no second derivative is asked for."""
    x, u, weight, A0, dA, B0, dB, seed = ctx.saved_tensors
    needs = (*ctx.needs_input_grad[:3], ctx.needs_input_grad[4], ctx.needs_input_grad[6])
    common = (weight, A0, dA, B0, dB, seed, ctx.scaling, ctx.dropout)
    if gy is None or gu is not None or torch.is_grad_enabled():
        gx, gweight, gbias, gdA, gdB = functions.gradients(gy, gu, x, u, *common, needs)
    else:
        wanted = [needs[0], needs[3], needs[4]]
        found = torch.ops.peta_fast.linearized_lora_backward(gy, x, u, *common, wanted)
        gx, gdA, gdB = (f if wants else None for f, wants in zip(found, wanted, strict=True))
        gweight = sum_of_outer_products(gy, x) if needs[1] else None
        gbias = rows_of(gy).sum(0) if needs[2] else None
    return gx, gweight, gbias, None, gdA, None, gdB, None, None, None


def _dual_gradients(ctx, gy0, gdy, gu):
    """As functions.Dual.backward, with the adapter's part as an operator."""
    x, dx, u, weight, A0, dA, B0, dB = ctx.saved_tensors
    needs = (*ctx.needs_input_grad[:4], ctx.needs_input_grad[5], ctx.needs_input_grad[7])
    found = functions.dual_gradients(
        gy0, gdy, gu, x, dx, u, weight, A0, dA, B0, dB, ctx.scaling, needs, _dual_backward_where_asked
    )
    return (*found[:4], None, found[4], None, found[5], None)


def _dual_backward_where_asked(*arguments):
    found = torch.ops.peta_fast.linearized_lora_dual_backward(*arguments)
    return tuple(f if wants else None for f, wants in zip(found, arguments[-1], strict=True))


torch.library.register_autograd(
    "peta_fast::linearized_lora", _gradients, setup_context=functions.LinearizedLoRA.setup_context, lib=LIBRARY
)
torch.library.register_autograd(
    "peta_fast::linearized_lora_dual", _dual_gradients, setup_context=functions.Dual.setup_context, lib=LIBRARY
)

forward = torch.ops.peta_fast.linearized_lora
dual = torch.ops.peta_fast.linearized_lora_dual
