"""Mapped inputs and the process's memory: read ahead, let go, back when touched."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from checkpoint_files import tensor_bytes
from safetensors.torch import save_file

from peta_fast.formats import open_checkpoint


def test_prefetch_takes_any_range_and_changes_nothing(tmp_path):
    save_file({"w": torch.arange(300_000.0), "e": torch.empty(0)}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    checkpoint.prefetch("w")
    checkpoint.prefetch("w", 299_999)
    checkpoint.prefetch("e")
    assert np.frombuffer(tensor_bytes(checkpoint, "w"), np.float32)[-1] == 299_999


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="measures memory through Linux's /proc")
def test_released_tensors_leave_the_process_and_come_back_when_touched(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, 32 << 20, dtype=np.uint8)
    save_file({"w": torch.from_numpy(values)}, tmp_path / "x.safetensors")
    checkpoint = open_checkpoint(tmp_path / "x.safetensors")
    checkpoint.release("w")
    before = file_backed_memory()
    buffer = checkpoint.buffer("w")
    assert np.array_equal(np.frombuffer(buffer.as_bytes(), np.uint8), values)
    assert file_backed_memory() - before > 30 << 20
    checkpoint.release("w")
    assert file_backed_memory() - before < 2 << 20
    assert np.array_equal(np.frombuffer(buffer.as_bytes(), np.uint8), values)


def file_backed_memory() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssFile"))
