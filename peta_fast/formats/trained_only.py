"""Checkpoints of what was trained alone: the tensors that are missing are the base's.

A safetensors file says so in its metadata, a state dict by its type. A merge takes the missing tensors from the base
without reading them from anywhere else; in any other checkpoint a missing tensor is a fault.
"""

from __future__ import annotations

from typing import Any

METADATA = {"peta_fast.tensors": "trained"}
"""In the header of such a file."""


class TrainedTensors(dict):
    """A state dict, name -> tensor, that holds what was trained and nothing else."""


def holds_trained_only(source: Any) -> bool:
    """Whether a checkpoint, as the engine sees it, leaves out what is as in the base."""
    metadata = getattr(source, "metadata", {})
    return all(metadata.get(key) == value for key, value in METADATA.items())
