"""The merge under a concrete mask as one differentiable operation.

    theta = base + sum_t lambda_t (tau_t m) / mean(m),   m = sigmoid((logit + log u - log(1 - u)) / temperature)

u comes from Philox, by key and element index, and is drawn again in every pass: the backward keeps no mask and no
masked task vector, only its inputs and one number. It goes over the tensor twice, since the mean's own gradient needs
a sum first. Bytes an element in fp32: forward 4 T + 16, backward 8 T + 20.
Source: Tang et al., Concrete subspace learning, 2023, arXiv:2312.06173.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from peta_fast.errors import CompatibilityError
from peta_fast.ops.concrete_mask import dispatch
from peta_fast.ops.concrete_mask.pieces import Piece

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def concrete_merge(
    base: Tensor,
    task_vectors: Sequence[Tensor],
    coefficients: Tensor,
    logits: Tensor | None,
    *,
    key: int,
    temperature: float = 0.5,
) -> Tensor:
    """base [*S] + sum_t coefficients[t] (task_vectors[t] m) / mean(m).

    base          [*S]  fp32, bf16, fp16, or fp64
    task_vectors  T tensors [*S] of such dtypes
    coefficients  [T]   lambda, unitless
    logits        [*S]  fp32 or fp64; None stands for no mask: plain task arithmetic
    key           of the noise, uint64: peta_fast.ops.concrete_mask.noise.mask_key

    Returns [*S] in base's dtype, contiguous; arithmetic in the logits' dtype, one rounding. Differentiable once, in
    base, logits and coefficients; task vectors get no gradient. A mask that keeps nothing gives the base.
    Raises CompatibilityError where shapes, dtypes or devices do not fit.
    """
    check_arguments("concrete_merge", base, task_vectors, coefficients, logits, temperature)
    return ConcreteMerge.apply(base, coefficients, logits, key, float(temperature), *task_vectors)


def sample_mask(logits: Tensor, *, key: int, temperature: float = 0.5, binary: bool = False) -> Tensor:
    """One sample of the mask, [*S] in the logits' dtype, not divided by its mean.

    binary  bool [*S] instead: m > 1/2, which is so with probability sigmoid(logit), whatever the temperature
    """
    check_temperature("sample_mask", temperature)
    logits = logits.detach()
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    dispatch.sample(logits, key, float(temperature), out)
    return out > 0.5 if binary else out


class ConcreteMerge(Function):
    """(base, coefficients, logits, key, temperature, *task_vectors) -> theta"""

    @staticmethod
    def forward(ctx, base, coefficients, logits, key, temperature, *task_vectors):
        out = torch.empty_like(base, memory_format=torch.contiguous_format)
        piece = Piece(task_vectors, coefficients.detach(), logits, key, base, out)
        (mean,) = dispatch.means([piece], temperature)
        dispatch.merge([piece], temperature)
        ctx.key, ctx.temperature = key, temperature
        ctx.save_for_backward(coefficients, logits, mean, *task_vectors)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        coefficients, logits, mean, *task_vectors = ctx.saved_tensors
        piece = Piece(task_vectors, coefficients, logits, ctx.key, g=g.contiguous(), mean=mean)
        wants_logits = logits is not None and ctx.needs_input_grad[2]
        g_coefficients = g_logits = None
        if wants_logits or ctx.needs_input_grad[1]:
            (found,) = dispatch.coefficient_gradients([piece], ctx.temperature)
            g_coefficients = found.to(coefficients.dtype)
        if wants_logits:
            shift = dispatch.shift_of(coefficients, found, mean, g.numel())
            (g_logits,) = dispatch.logit_gradients([piece], [shift], ctx.temperature)
        return g, g_coefficients, g_logits, None, None, *(None for _ in task_vectors)


def check_arguments(who, base, task_vectors, coefficients, logits, temperature) -> None:
    """Raises CompatibilityError, naming the argument, what was expected and what came."""
    check_temperature(who, temperature)
    if not task_vectors:
        raise CompatibilityError(who, "got no task vectors", "Give at least one.")
    if tuple(coefficients.shape) != (len(task_vectors),):
        raise CompatibilityError(
            who, f"coefficients is {list(coefficients.shape)}, expected [{len(task_vectors)}]", "One a task vector."
        )
    named = [(f"task_vectors[{t}]", x) for t, x in enumerate(task_vectors)]
    for name, tensor in [("base", base), *named, *([] if logits is None else [("logits", logits)])]:
        if tensor.shape != base.shape or tensor.device != base.device:
            raise CompatibilityError(
                who,
                f"{name} is {list(tensor.shape)} on {tensor.device}, base is {list(base.shape)} on {base.device}",
                "All tensors must have the base's shape and device.",
            )
        if tensor.dtype not in FLOATING:
            raise CompatibilityError(who, f"{name} is {tensor.dtype}, expected a floating dtype", "Leave it as it is.")
    if logits is not None and logits.dtype not in (torch.float32, torch.float64):
        raise CompatibilityError(
            who, f"logits is {logits.dtype}, expected fp32", "Steps of 1e-3 vanish in 16 bits: keep logits in fp32."
        )


def check_temperature(who: str, temperature: float) -> None:
    if not 0 < temperature < float("inf"):
        raise CompatibilityError(who, f"temperature is {temperature}, expected one above 0", "The paper has 0.5.")
