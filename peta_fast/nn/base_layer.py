"""Which layers can be linearized, what their weight means, and why the others cannot."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peta_fast.errors import CompatibilityError

QUANTIZED = ("Linear4bit",)
"""bitsandbytes' layers whose weight is dequantized at every call."""


def type_name(module: nn.Module) -> str:
    return type(module).__name__


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D: a Linear whose weight is [in, out]."""
    return type_name(module) == "Conv1D" and hasattr(module, "nf")


def is_quantized(module: nn.Module) -> bool:
    return type_name(module) in QUANTIZED


def is_supported(module: nn.Module) -> bool:
    return refusal(module) is None


def refusal(module: nn.Module) -> tuple[str, str] | None:
    """What is wrong with the module and what to do about it; None where it can be linearized."""
    kind = type_name(module)
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return (
            f"is a {kind}, expected a Linear: an embedding's adapter is looked up, not multiplied",
            "Leave it out of target_modules; to train it in full, name it in modules_to_save.",
        )
    if is_conv1d(module) or is_quantized(module):
        return hooks_refusal(module)
    if not isinstance(module, nn.Linear):
        return f"is a {kind}, expected nn.Linear or transformers' Conv1D", "Name the Linear layers inside it."
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return (
            "is the output projection of nn.MultiheadAttention, which reads its weight and never calls it",
            "Leave it out of target_modules.",
        )
    if type(module).forward is not nn.Linear.forward:
        return (
            f"is a {kind} with a forward of its own, which linearization would replace",
            "Convert it to nn.Linear, or leave it out.",
        )
    return hooks_refusal(module)


def hooks_refusal(module: nn.Module) -> tuple[str, str] | None:
    if hasattr(module, "_hf_hook") or module._forward_hooks or module._forward_pre_hooks:
        return "has forward hooks, which would be lost", "Linearize before dispatching the model or adding hooks."
    return None


def check_supported(module: nn.Module, who: str) -> None:
    """Raises CompatibilityError where the module cannot be linearized."""
    found = refusal(module)
    if found is not None:
        raise CompatibilityError(who, *found)


def features(module: nn.Module) -> tuple[int, int]:
    """(in, out)"""
    if is_conv1d(module):
        return tuple(module.weight.shape)
    return module.in_features, module.out_features


def compute_dtype(module: nn.Module) -> torch.dtype:
    """The dtype of the weight as it is multiplied."""
    if is_quantized(module):
        return getattr(module, "compute_dtype", None) or torch.float32
    return module.weight.dtype


def dequantized(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[out, in] of dtype, from bitsandbytes' packed 4-bit weight."""
    from bitsandbytes.functional import dequantize_4bit

    if getattr(weight, "quant_state", None) is None:
        raise CompatibilityError(
            "weight", "is 4-bit but carries no quant_state", "Move the model to its device before linearizing it."
        )
    return dequantize_4bit(weight.data, weight.quant_state).to(dtype)


def matrix(module: nn.Module) -> Tensor:
    """The weight [out, in] as it is multiplied."""
    if is_quantized(module):
        return dequantized(module.weight, compute_dtype(module))
    return module.weight.t() if is_conv1d(module) else module.weight
