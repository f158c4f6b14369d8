"""Checkpoint files in and out. Headers are checked before anything is believed; tensors are mapped, never loaded.

One file per weight format, found by looking into this folder: a module that has

    matches(path: Path) -> bool               by the name alone
    read_tensors(file: Path) -> FileIndex     raises CheckpointError for a damaged file
"""

from __future__ import annotations

from peta_fast.formats.checkpoint import Checkpoint, open_checkpoint
from peta_fast.formats.companions import copy_companions
from peta_fast.formats.disk import free_bytes
from peta_fast.formats.model_card import model_card
from peta_fast.formats.safetensors_writer import ShardLayout, ShardWriter, index_json, layout_shards
from peta_fast.formats.tensor_index import FileIndex, TensorInfo

__all__ = [
    "Checkpoint", "FileIndex", "ShardLayout", "ShardWriter", "TensorInfo", "copy_companions", "free_bytes",
    "index_json", "layout_shards", "model_card", "open_checkpoint",
]  # fmt: skip
