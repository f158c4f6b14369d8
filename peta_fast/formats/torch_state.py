"""Checkpoints as torch sees them: state dicts over mapped memory."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from peta_fast.buffers import LONG_NAMES
from peta_fast.formats.checkpoint import Checkpoint


def torch_state(checkpoint: Checkpoint) -> dict[str, Any]:
    """name -> torch tensor over the checkpoint's mapped memory: not copied, not to be written."""
    import torch

    state = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the memory is read-only, which merges respect
        for name, info in checkpoint.tensors.items():
            dtype = getattr(torch, LONG_NAMES[info.dtype])
            if info.size:
                raw = np.frombuffer(checkpoint.buffer(name).as_bytes(), np.uint8)
                state[name] = torch.from_numpy(raw).view(dtype).reshape(info.shape)
            else:
                state[name] = torch.empty(info.shape, dtype=dtype)
    for alias, name in checkpoint.aliases.items():
        state[alias] = state[name]
    return state
