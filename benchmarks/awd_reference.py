"""Adaptive weight disentanglement as it is written down: gradient descent on all N elements of the common vector.

Twice: by autograd, as one would write it from the paper, and with the gradient by hand, which is faster. Shares no code
with peta_fast.
Source: Xiong et al., 2024, arXiv:2411.18729.
"""

from __future__ import annotations

import torch
from torch import Tensor

ALPHA, LEARNING_RATE, ITERATIONS = 0.1, 0.01, 300


def by_autograd(tau: Tensor, iterations: int = ITERATIONS) -> Tensor:
    """tau [T, N] -> delta [N]"""
    delta = torch.zeros_like(tau[0], requires_grad=True)
    tasks = len(tau)
    for _ in range(iterations):
        left = torch.nn.functional.normalize(tau - delta, dim=1)
        loss = (left @ left.T).triu(1).abs().sum() * 2 / (tasks * (tasks - 1))
        if bool(delta.detach().any()):
            loss = loss + ALPHA * torch.linalg.vector_norm(delta)
        (gradient,) = torch.autograd.grad(loss, delta)
        with torch.no_grad():
            delta -= LEARNING_RATE * gradient
    return delta.detach()


@torch.no_grad()
def by_hand(tau: Tensor, iterations: int = ITERATIONS) -> Tensor:
    """The same with buffers that are reused: tau - delta, one Gram matrix, one product for the gradient."""
    delta, left = torch.zeros_like(tau[0]), torch.empty_like(tau)
    tasks = len(tau)
    for _ in range(iterations):
        torch.sub(tau, delta, out=left)
        inner = (left @ left.T).double()
        inverse = inner.diagonal().rsqrt()
        cosine = inner * torch.outer(inverse, inverse)
        cosine.fill_diagonal_(0)
        sign = cosine.sign()
        pull = -inverse * (sign @ inverse) + (sign * cosine).sum(1) * inverse**2
        gradient = (2 / (tasks * (tasks - 1)) * pull).to(tau.dtype) @ left
        length = torch.linalg.vector_norm(delta)
        if length > 0:
            gradient.add_(delta, alpha=float(ALPHA / length))
        delta.sub_(gradient, alpha=LEARNING_RATE)
    return delta
