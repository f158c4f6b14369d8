"""Which transforms of functions are active: the ways into linearized_lora differ in which of them they know."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd import forward_ad


def in_functorch() -> bool:
    """Whether torch.func.grad, jvp, vmap or a kin of theirs runs the code that asks."""
    return torch._C._are_functorch_transforms_active()


def in_forward_ad() -> bool:
    """Whether a level of forward-mode differentiation is open, be it torch.func.jvp's or forward_ad.dual_level's."""
    return forward_ad._current_level >= 0


def tangent_among(tensors: Iterable[Tensor | None]) -> bool:
    """Whether one of the tensors carries a tangent of the innermost level."""
    if not in_forward_ad():
        return False
    return any(forward_ad.unpack_dual(t).tangent is not None for t in tensors if isinstance(t, Tensor))
