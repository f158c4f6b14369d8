"""Reentrant checkpointing without an input that requires gradients trains nothing, without a word. Here it is an error.

torch.utils.checkpoint(use_reentrant=True) runs the forward without autograd and repeats it in the backward; where no
argument requires a gradient, that backward never comes and the adapters inside get none.
"""

from __future__ import annotations

import sys
from types import FrameType

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointFunction

from peta_fast.errors import CompatibilityError

_FORWARD = CheckpointFunction.forward.__code__


def refuse_lost_gradients(who: str, x: Tensor, step: Tensor) -> None:
    """Called where gradients are off while training. Raises CompatibilityError inside a checkpoint as above."""
    if torch.compiler.is_compiling() or not step.requires_grad or x.requires_grad:
        return
    frame = _checkpoint_above(sys._getframe())
    if frame is None:
        return
    arguments = frame.f_locals.get("args", ())
    if not any(isinstance(a, Tensor) and a.requires_grad for a in arguments):
        raise CompatibilityError(
            who,
            "runs inside reentrant checkpointing whose inputs require no gradient: the adapter would get none",
            "Use use_reentrant=False (gradient_checkpointing_kwargs={'use_reentrant': False}), or call "
            "model.enable_input_require_grads().",
        )


def _checkpoint_above(frame: FrameType | None) -> FrameType | None:
    while frame is not None and frame.f_code is not _FORWARD:
        frame = frame.f_back
    return frame
