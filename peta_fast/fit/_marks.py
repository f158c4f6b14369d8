"""Marks of a network's weights, for the metadata of what is made from it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from peta_fast._beside import owner_of
from peta_fast.buffers import SHORT_NAMES
from peta_fast.formats.weight_marks import mark_of, marked, runs_of


def marks(state: Mapping[str, Tensor], keys: Iterable[str]) -> str:
    """Of the tensors that statistics under `keys` belong to, as JSON by name."""
    names = dict.fromkeys(map(owner_of, keys))
    return json.dumps({name: mark for name in names if name in state and (mark := _mark(state[name]))})


@torch.no_grad()
def _mark(tensor: Tensor) -> str:
    dtype = SHORT_NAMES.get(str(tensor.dtype).removeprefix("torch."), "")
    if not marked(dtype):
        return ""
    flat = tensor.detach().reshape(-1)
    parts = [flat[start:stop].float().cpu().numpy() for start, stop in runs_of(flat.numel())]
    return mark_of(np.concatenate(parts) if parts else np.empty(0, np.float32), dtype)
