"""Which code computes linearized LoRA: the Triton kernels on CUDA, elsewhere the closed form in plain PyTorch."""

from __future__ import annotations

from peta_fast.ops.linearized_lora import closed_form
from peta_fast.ops.linearized_lora.reference import dual_reference


def forward(x, weight, bias, A0, dA, B0, dB, seed, scaling, dropout):
    """y [*, out], u [*, r]"""
    return closed_form.forward(x, weight, bias, A0, dA, B0, dB, seed, scaling, dropout)


def backward(gy, x, u, weight, A0, dA, B0, dB, seed, scaling, dropout, needs):
    """The gradients of x, dA, dB, each where `needs` says so, else None."""
    return closed_form.backward(gy, x, u, weight, A0, dA, B0, dB, seed, scaling, dropout, needs)


def dual(x, dx, weight, bias, A0, dA, B0, dB, scaling):
    """y0, dy [*, out], u [*, r]"""
    return dual_reference(x, dx, weight, bias, A0, dA, B0, dB, scaling)
