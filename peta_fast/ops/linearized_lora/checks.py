"""What the arguments of linearized_lora must be, and what is said when they are not."""

from __future__ import annotations

import torch
from torch import Tensor

from peta_fast.errors import CompatibilityError

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_arguments(
    who: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A0: Tensor,
    dA: Tensor | None,
    B0: Tensor | None,
    dB: Tensor,
) -> None:
    """Raises CompatibilityError, naming the argument, what was expected and what came."""
    if alike(x, weight, bias, A0, dA, B0, dB):
        return
    if (dA is None) != (B0 is None):
        given, missing = ("B0", "dA") if dA is None else ("dA", "B0")
        raise CompatibilityError(
            who, f"{given} is given without {missing}", "Give both, or neither where B0 = 0: dA has no effect there."
        )
    check_shapes(who, x, weight, bias, A0, dA, B0, dB)
    check_dtypes(who, x, weight, bias, A0, dA, B0, dB)


def alike(x, weight, bias, A0, dA, B0, dB) -> bool:
    """Whether all is as it mostly is: shapes fit, and there is one dtype and one device. Says no without a reason."""
    if weight.dim() != 2 or A0.dim() != 2 or x.dim() == 0 or (dA is None) != (B0 is None):
        return False
    (out, features), r, dtype, device = weight.shape, A0.shape[0], x.dtype, x.device
    fits = r > 0 and dtype in FLOATING and x.shape[-1] == A0.shape[1] == features and dB.shape == (out, r)
    fits = fits and weight.dtype == A0.dtype == dB.dtype == dtype and weight.device == A0.device == dB.device == device
    if bias is not None:
        fits = fits and bias.shape == (out,) and bias.dtype == dtype and bias.device == device
    if dA is not None:
        fits = fits and dA.shape == A0.shape and B0.shape == dB.shape and dA.dtype == B0.dtype == dtype
        fits = fits and dA.device == B0.device == device and not B0.requires_grad
    return fits and not A0.requires_grad


def check_shapes(who, x, weight, bias, A0, dA, B0, dB) -> None:
    if weight.dim() != 2:
        raise CompatibilityError(who, f"weight is {shape(weight)}, expected [out, in]", "Give the matrix of a Linear.")
    features_out, features_in = weight.shape
    if x.dim() == 0 or x.shape[-1] != features_in:
        raise CompatibilityError(
            who,
            f"x is {shape(x)}, expected [*, {features_in}] for weight {shape(weight)}",
            "The last dimension of x must be the layer's in_features; a Conv1D's weight is passed transposed.",
        )
    if A0.dim() != 2 or A0.shape[0] == 0:
        raise CompatibilityError(
            who, f"A0 is {shape(A0)}, expected [r, {features_in}] with r >= 1", "Choose a rank of at least 1."
        )
    r = A0.shape[0]
    expected = {"bias": (features_out,), "A0": (r, features_in), "dA": (r, features_in), "B0": (features_out, r),
                "dB": (features_out, r)}  # fmt: skip
    for name, tensor in (("bias", bias), ("A0", A0), ("dA", dA), ("B0", B0), ("dB", dB)):
        if tensor is not None and tuple(tensor.shape) != expected[name]:
            raise CompatibilityError(
                who,
                f"{name} is {shape(tensor)}, expected {list(expected[name])} for weight {shape(weight)} and rank {r}",
                "A0 and dA are [r, in], B0 and dB [out, r]; r is A0's first size.",
            )


def check_dtypes(who, x, weight, bias, A0, dA, B0, dB) -> None:
    for name, tensor in (("weight", weight), ("bias", bias), ("A0", A0), ("dA", dA), ("B0", B0), ("dB", dB)):
        if tensor is None:
            continue
        if tensor.device != x.device:
            raise CompatibilityError(
                who, f"{name} is on {tensor.device}, x on {x.device}", "Move the layer or its input with .to(device)."
            )
        if tensor.dtype not in FLOATING:
            raise CompatibilityError(
                who, f"{name} is {tensor.dtype}, expected a floating dtype", "Dequantize the weight before the call."
            )
        if name in ("weight", "bias") and tensor.dtype != x.dtype:
            raise CompatibilityError(
                who,
                f"{name} is {tensor.dtype}, x is {x.dtype}",
                "Convert one of them, or run under torch.autocast; the adapter alone may be of another dtype.",
            )
        if name in ("A0", "B0") and tensor.requires_grad:
            raise CompatibilityError(
                who, f"{name} requires a gradient, but the linearization point is fixed", f"Give {name}.detach()."
            )
    if x.dtype not in FLOATING:
        raise CompatibilityError(
            who, f"x is {x.dtype}, expected a floating dtype", "Convert it with .to(weight.dtype)."
        )


def check_dropout(who: str, dropout: float) -> None:
    if not 0.0 <= dropout <= 1.0:
        raise CompatibilityError(who, f"dropout is {dropout}, expected a probability", "Give a number from 0 to 1.")


def check_tangent(who: str, x: Tensor, dx: Tensor | None) -> None:
    if dx is not None and (dx.shape != x.shape or dx.dtype != x.dtype or dx.device != x.device):
        raise CompatibilityError(
            who,
            f"dx is {shape(dx)} {dx.dtype} on {dx.device}, x is {shape(x)} {x.dtype} on {x.device}",
            "A tangent has its primal's shape, dtype and device; None stands for a zero tangent.",
        )


def shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
