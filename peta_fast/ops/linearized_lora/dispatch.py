"""Which code computes linearized LoRA: the Triton kernels for 16 bits on CUDA, elsewhere the closed form in PyTorch."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from peta_fast.ops.linearized_lora import closed_form

LARGEST_RANK = 128
"""Beyond it the kernels' block shapes are not built or tested."""


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def runs_kernels(x: Tensor, A0: Tensor) -> bool:
    """fp32 and fp64 stay with cuBLAS: a GPU's matrix units take them in less precision or not from Triton."""
    if x.device.type != "cuda" or x.dtype not in (torch.bfloat16, torch.float16) or A0.shape[0] > LARGEST_RANK:
        return False
    return has_triton() and not isinstance(x, FakeTensor)


def forward(x, weight, bias, A0, dA, B0, dB, seed, scaling, dropout):
    """y [*, out], u [*, r]"""
    return _code(x, A0).forward(x, weight, bias, A0, dA, B0, dB, seed, scaling, dropout)


def backward(gy, x, u, weight, A0, dA, B0, dB, seed, scaling, dropout, needs):
    """The gradients of x, dA, dB, each where `needs` says so, else None."""
    return _code(gy, A0).backward(gy, x, u, weight, A0, dA, B0, dB, seed, scaling, dropout, needs)


def dual(x, dx, weight, bias, A0, dA, B0, dB, scaling):
    """y0, dy [*, out], u [*, r]"""
    return _code(x, A0).dual(x, dx, weight, bias, A0, dA, B0, dB, scaling)


def _code(x: Tensor, A0: Tensor):
    if not runs_kernels(x, A0):
        return closed_form
    from peta_fast.ops.linearized_lora import launch

    return launch
