"""Concrete masks in plain PyTorch, a whole tensor at a time: the formulas, and nothing else.

    m     = sigmoid((logit + log u - log(1 - u)) / temperature)
    theta = base + sum_t lambda_t (tau_t m) / mean(m)

With g = dL/dtheta, D = sum_t lambda_t tau_t, n elements and mbar = mean(m):

    dL/dlambda_t = sum_i g_i tau_{t,i} m_i / mbar
    dL/dlogit_i  = (g_i D_i / mbar - S / (n mbar^2)) m_i (1 - m_i) / temperature,   S = sum_j g_j D_j m_j

Where a mask keeps nothing at all (mean 0) theta is the base. Every dtype, every device, differentiable; the usual way
keeps T masked task vectors for the backward, and so does this one.
Source: Tang et al., Concrete subspace learning, 2023, arXiv:2312.06173; the mean of each tensor by itself, as there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def mask_reference(logits: Tensor, uniforms: Tensor, temperature: float = 0.5) -> Tensor:
    """logits [*S], uniforms [*S] in (0, 1) -> m [*S] in [0, 1]"""
    return torch.sigmoid((logits + uniforms.log() - (1 - uniforms).log()) / temperature)


def merge_reference(base: Tensor, task_vectors: Sequence[Tensor], coefficients: Tensor, mask: Tensor) -> Tensor:
    """base [*S], T task vectors [*S], coefficients [T], mask [*S] -> theta [*S]"""
    mean = mask.mean()
    scaled = mask / torch.where(mean > 0, mean, torch.ones_like(mean))
    for coefficient, task_vector in zip(coefficients, task_vectors, strict=True):
        base = base + coefficient * (task_vector * scaled)
    return base


def gradients_reference(
    g: Tensor, task_vectors: Sequence[Tensor], coefficients: Tensor, mask: Tensor, temperature: float = 0.5
) -> tuple[Tensor, Tensor]:
    """g [*S] -> the gradients of the logits [*S] and of the coefficients [T], in closed form."""
    mean = mask.mean()
    inverse = torch.where(mean > 0, 1 / mean, torch.zeros_like(mean))
    sums = torch.stack([(g * t * mask).sum() for t in task_vectors]) * inverse
    direction = sum(c * t for c, t in zip(coefficients, task_vectors, strict=True))
    shift = (coefficients * sums).sum() * inverse / mask.numel()
    return (g * direction * inverse - shift) * mask * (1 - mask) / temperature, sums
