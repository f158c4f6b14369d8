"""Which code computes linearized LoRA: the Triton kernels for 16 bits on CUDA, elsewhere the closed form in PyTorch."""

from __future__ import annotations

import functools
import importlib.util
import warnings

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from peta_fast.ops.linearized_lora import closed_form

LARGEST_RANK = 128
"""Beyond it the kernels' block shapes are not built or tested."""
OLDEST = (8, 0)
"""Compute capability that multiplies bf16."""
_refused: set[torch.device] = set()


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def runs_kernels(x: Tensor, A0: Tensor) -> bool:
    """fp32 and fp64 stay with cuBLAS: a GPU's matrix units take them in less precision or not from Triton."""
    if x.device.type != "cuda" or x.dtype not in (torch.bfloat16, torch.float16) or A0.shape[0] > LARGEST_RANK:
        return False
    return has_triton() and not isinstance(x, FakeTensor) and builds_kernels(x.device)


def builds_kernels(device: torch.device) -> bool:
    return device not in _refused and torch.version.hip is None and torch.cuda.get_device_capability(device) >= OLDEST


def forward(x, weight, bias, A0, dA, B0, dB, seed, scaling, dropout):
    """y [*, out], u [*, r]"""
    return _run("forward", x, A0, x, weight, bias, A0, dA, B0, dB, seed, scaling, dropout)


def backward(gy, x, u, weight, A0, dA, B0, dB, seed, scaling, dropout, needs):
    """The gradients of x, dA, dB, each where `needs` says so, else None."""
    return _run("backward", gy, A0, gy, x, u, weight, A0, dA, B0, dB, seed, scaling, dropout, needs)


def dual(x, dx, weight, bias, A0, dA, B0, dB, scaling):
    """y0, dy [*, out], u [*, r]"""
    return _run("dual", x, A0, x, dx, weight, bias, A0, dA, B0, dB, scaling)


def dual_backward(gy0, gdy, x, u, weight, A0, dA, B0, dB, scaling, needs):
    """The gradients of x, dx, dA, dB, each where `needs` says so, else None; gy0 None is zero."""
    return _run("dual_backward", gdy, A0, gy0, gdy, x, u, weight, A0, dA, B0, dB, scaling, needs)


def _run(name: str, x: Tensor, A0: Tensor, *arguments):
    """By kernel, unless Triton cannot build it for this GPU: then, with a warning, by the closed form ever after."""
    if runs_kernels(x, A0):
        from triton.errors import TritonError

        from peta_fast.ops.linearized_lora import launch

        try:
            return getattr(launch, name)(*arguments)
        except TritonError as error:
            give_up(x.device, error)
    return getattr(closed_form, name)(*arguments)


def give_up(device: torch.device, error: Exception) -> None:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    warnings.warn(
        f"linearized_lora: Triton builds no kernels for {torch.cuda.get_device_name(device)} ({reason}); "
        "plain PyTorch runs in their place.",
        RuntimeWarning,
        stacklevel=2,
    )
    _refused.add(device)
