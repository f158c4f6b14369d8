"""Tensors that adapters replace as a whole (modules_to_save, biases, embeddings), in a merge of adapters.

Without the base they are no changes that could be added up: what one adapter alone replaces is carried along as it is,
what several replace by different values is refused unless the user says what is to become of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from peta_fast.buffers import LONG_NAMES, Buffer
from peta_fast.errors import CheckpointError, CompatibilityError
from peta_fast.formats.lora_adapter import LoraAdapter

REPLACED = ("refuse", "mean", "first")


def carried(adapters: Sequence[LoraAdapter], policy: str = "refuse") -> dict[str, Tensor]:
    """The tensors of the result, by the keys they have in the adapters' files.

    Raises CompatibilityError where adapters disagree on a tensor and the policy is "refuse", or on its shape.
    """
    found: dict[str, list[LoraAdapter]] = {}
    for adapter in adapters:
        for name in adapter.replaced:
            found.setdefault(name, []).append(adapter)
    _refuse_both_ways(adapters, found)
    return {having[0].replaced[name]: _one(name, having, policy) for name, having in found.items()}


def _refuse_both_ways(adapters: Sequence[LoraAdapter], found: dict[str, list[LoraAdapter]]) -> None:
    for adapter in adapters:
        for module in adapter.modules.values():
            others = [a for a in found.get(module.tensor, ()) if a is not adapter]
            if others:
                raise CompatibilityError(
                    module.tensor, f"{adapter} changes it, {others[0]} replaces it as a whole",
                    "Apply one of them to the base first, or leave one out.",
                )  # fmt: skip


def _one(name: str, having: Sequence[LoraAdapter], policy: str) -> Tensor:
    tensors = [tensor_of(adapter, name) for adapter in having]
    first = tensors[0]
    for adapter, tensor in zip(having[1:], tensors[1:], strict=True):
        if tensor.shape != first.shape:
            raise CompatibilityError(
                name, f"is {list(first.shape)} in {having[0]}, {list(tensor.shape)} in {adapter}",
                "They belong to different base models.",
            )  # fmt: skip
    if policy == "first" or all(torch.equal(t, first) for t in tensors[1:]):
        return first
    if policy == "mean" and first.is_floating_point():
        return (sum(t.double() for t in tensors) / len(tensors)).to(first.dtype)
    raise CompatibilityError(
        name, f"{' and '.join(map(str, having))} replace it as a whole, by different values",
        "Without the base they cannot be added up: --replaced mean or first, or `peta-fast adapter apply` on the base.",
    )  # fmt: skip


def tensor_of(adapter: LoraAdapter, name: str) -> Tensor:
    """A copy of a whole tensor. Raises CheckpointError when it is not finite."""
    info = adapter.info(name)
    tensor = as_tensor(adapter.buffer(name)).reshape(info.shape)
    if tensor.is_floating_point() and not tensor.isfinite().all():
        raise CheckpointError(str(info.file), f"{adapter.replaced[name]!r}: expected finite values, got NaN or inf")
    return tensor


def as_tensor(buffer: Buffer) -> Tensor:
    """[size] a copy of a buffer's elements in their own dtype."""
    raw = torch.from_numpy(np.array(np.frombuffer(buffer.as_bytes(), np.uint8)))
    return raw.view(getattr(torch, LONG_NAMES[buffer.dtype]))
