"""Several linearized LoRA layers of one x (q, k and v; gate and up) as one differentiable operation.

    y_i = x W0_iᵀ + b_i + s_i · [(D_i(x) A0_iᵀ) (B0_i + dB_i)ᵀ + (D_i(x) dA_iᵀ) B0_iᵀ]

Forward: all down-projections from one read of x. Backward: the gradient of x grows in one tensor, which saves the
G - 1 additions of [M, in] of G single layers; the gradients of dA and dB are those of the single layers.
On a GPU and beyond FUSED_ROWS rows: 1 + G launches forward, 2 G + 1 backward and one more for each dA, G of both being
cuBLAS; G single layers take 2 G, and 3 G with G - 1 additions. With fewer rows the forward is a fused kernel for each.
Equal to the single layers to rounding, not bit for bit. Dropout's masks are theirs, drawn in the order given.
Source: Tang et al., ICLR 2024, arXiv:2310.04742.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from peta_fast.errors import CompatibilityError
from peta_fast.ops.linearized_lora import checks, dispatch, functions, group_closed_form
from peta_fast.ops.linearized_lora.dropout import draw_seed
from peta_fast.ops.linearized_lora.group_closed_form import Part
from peta_fast.ops.linearized_lora.modes import in_functorch, tangent_among
from peta_fast.ops.linearized_lora.op import in_autocast_dtype, linearized_lora
from peta_fast.ops.linearized_lora.reference import rows_of, sum_of_outer_products

TENSORS = 7
"""Of a Part, the rest are numbers."""
WEIGHT, BIAS, A0, DA, B0, DB, SEED = range(TENSORS)


class Projection(NamedTuple):
    """One layer's arguments, as linearized_lora has them; out and r may differ from layer to layer."""

    weight: Tensor
    bias: Tensor | None
    A0: Tensor
    dA: Tensor | None
    B0: Tensor | None
    dB: Tensor
    scaling: float
    dropout: float = 0.0


def linearized_lora_group(
    x: Tensor, projections: Sequence[Projection], *, training: bool = False
) -> tuple[Tensor, ...]:
    """[linearized_lora(x, *p[:7], dropout=p.dropout, training=training) for p in projections], from one read of x.

    x            [*, in]  fp64, fp32, bf16 or fp16; any strides
    projections  one or more; layers with B0 = 0 (dA and B0 None) and with both factors may be mixed

    Returns as many tensors [*, out_i] in x's dtype (torch.autocast's, where it is on). Differentiable as the single
    layers are, to any order; under torch.compile and inside functional transforms it is the single layers.
    Raises CompatibilityError, naming the projection, where shapes, dtypes or devices do not fit.
    """
    projections = [Projection(*p) for p in projections]
    if not projections:
        raise CompatibilityError("linearized_lora_group", "got no projections", "Give one or more.")
    tensors = [t for p in projections for t in p[:6]]
    if torch.compiler.is_compiling() or in_functorch() or tangent_among((x, *tensors)):
        return tuple(linearized_lora(x, *p[:7], dropout=p.dropout, training=training) for p in projections)
    x, *cast = in_autocast_dtype(x, *(t for p in projections for t in p[:2]))
    parts = []
    for i, p in enumerate(projections):
        p, who = p._replace(weight=cast[2 * i], bias=cast[2 * i + 1]), f"linearized_lora_group: projection {i}"
        checks.check_arguments(who, x, *p[:6])
        checks.check_dropout(who, p.dropout)
        dropout = float(p.dropout) if training else 0.0
        parts.append(Part(*p[:6], draw_seed(x.device) if dropout else None, float(p.scaling), dropout))
    numbers = tuple((part.scaling, part.dropout) for part in parts)
    return LinearizedLoRAGroup.apply(x, numbers, *(t for part in parts for t in part[:TENSORS]))[: len(parts)]


class LinearizedLoRAGroup(Function):
    """(x, numbers, tensors of the first Part, of the second, ...) -> every y, every u

    Every u is an output, so that a second derivative finds its way through it to x.
    """

    @staticmethod
    def forward(x, numbers, *tensors):
        ys, us = code_of(x, parts := parts_of(numbers, tensors)).forward(x, parts)
        return *ys, *us

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.numbers, *tensors = inputs
        ctx.set_materialize_grads(False)
        needs = of_parts(ctx.needs_input_grad[2:])
        keeps_x = any(n[WEIGHT] or n[DA] for n in needs)
        still = [i for i, n in enumerate(needs) if not any(n) and not ctx.needs_input_grad[0]]
        ctx.mark_non_differentiable(*(output[i + k] for i in still for k in (0, len(needs))))
        biases = [t if i % TENSORS != BIAS else None for i, t in enumerate(tensors)]
        ctx.save_for_backward(x if keeps_x else None, *output[len(ctx.numbers) :], *biases)

    @staticmethod
    def backward(ctx, *gradients):
        count = len(ctx.numbers)
        x, *saved = ctx.saved_tensors
        us, parts = saved[:count], parts_of(ctx.numbers, saved[count:])
        needs_x, needs = ctx.needs_input_grad[0], of_parts(ctx.needs_input_grad[2:])
        gys, gus = gradients[:count], gradients[count:]
        if is_differentiated(gradients, x, us, parts):
            gx, found = summed(gys, gus, x, us, parts, needs_x, needs)
        else:
            gx, found = at_once(gys, x, us, parts, needs_x, needs)
        return gx, None, *(g for of_part in found for g in of_part)


def parts_of(numbers: Sequence[tuple[float, float]], tensors: Sequence[Tensor | None]) -> list[Part]:
    return [Part(*of_part, *n) for of_part, n in zip(of_parts(tensors), numbers, strict=True)]


def of_parts(values: Sequence) -> list[Sequence]:
    """Cut into one piece for each part."""
    return [values[i : i + TENSORS] for i in range(0, len(values), TENSORS)]


def code_of(x: Tensor, parts: Sequence[Part]):
    """The kernels where all parts have them, the closed form elsewhere: a module with forward and backward."""
    if not all(dispatch.runs_kernels(x, part.A0) for part in parts):
        return group_closed_form
    from peta_fast.ops.linearized_lora import group_launch

    return group_launch


def is_differentiated(gradients: Sequence[Tensor | None], x: Tensor | None, us, parts: Sequence[Part]) -> bool:
    """Whether somebody differentiates or batches the backward, or comes back through a u."""
    if torch.is_grad_enabled() or in_functorch() or any(gu is not None for gu in gradients[len(parts) :]):
        return True
    return tangent_among((*gradients, x, *us, *(t for part in parts for t in part[:SEED])))


def summed(gys, gus, x, us, parts: Sequence[Part], needs_x: bool, needs) -> tuple[Tensor | None, list[list]]:
    """The gradients as those of the single layers, one after the other: made of differentiable operations."""
    gx, found = None, []
    for gy, gu, u, part, n in zip(gys, gus, us, parts, needs, strict=True):
        if gy is None and gu is None:
            found.append([None] * TENSORS)
            continue
        tensors = (part.weight, *part[A0:SEED], part.seed, part.scaling, part.dropout)
        wanted = (needs_x, n[WEIGHT], n[BIAS], n[DA], n[DB])
        own_gx, gweight, gbias, gdA, gdB = functions.gradients(gy, gu, x, u, *tensors, wanted)
        gx = own_gx if gx is None else gx + own_gx
        found.append([gweight, gbias, None, gdA, None, gdB, None])
    return gx, found


def at_once(gys, x, us, parts: Sequence[Part], needs_x: bool, needs) -> tuple[Tensor | None, list[list]]:
    given = [g for g in gys if g is not None]
    if not given:
        return None, [[None] * TENSORS for _ in parts]
    wanted = (needs_x, [bool(n[DA]) for n in needs], [bool(n[DB]) for n in needs])
    gx, gdAs, gdBs = code_of(given[0], parts).backward(gys, x, us, parts, *wanted)
    found = []
    for gy, n, gdA, gdB in zip(gys, needs, gdAs, gdBs, strict=True):
        gweight = sum_of_outer_products(gy, x) if n[WEIGHT] and gy is not None else None
        gbias = rows_of(gy).sum(0) if n[BIAS] and gy is not None else None
        found.append([gweight, gbias, None, gdA, None, gdB, None])
    return gx, found
