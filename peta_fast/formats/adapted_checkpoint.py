"""A checkpoint with LoRA adapters on it, as the engine sees a checkpoint: no changed tensor is ever formed as a whole.

    W + sum over adapters of weight * scaling * B A     formed tile by tile in fp32, ranks ascending, adapters in order

The factor on the left is rounded once: fp32(weight * scaling * B). Whole tensors of an adapter (modules_to_save,
biases) stand in the place of the base's. A name that the base ties to another one is untied where only one of the two
is changed.
"""

from __future__ import annotations

import difflib
import math
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from peta_fast.buffers import MERGEABLE, Buffer, FactorsBuffer, empty_panels, put_in_panels
from peta_fast.errors import CompatibilityError
from peta_fast.formats.checkpoint import Checkpoint
from peta_fast.formats.lora_adapter import LoraAdapter, LoraModule
from peta_fast.formats.tensor_index import TensorInfo


@dataclass(frozen=True)
class AdaptedTensor:
    """What the header of a changed tensor would say.

    read_bytes    that forming it reads beside the base's tensor
    factor_bytes  of memory that its factors take meanwhile
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    read_bytes: int = 0
    factor_bytes: int = 0

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class AdaptedCheckpoint:
    """A Checkpoint and adapters with their weights; see Checkpoint for what it has.

    base  the checkpoint below
    Raises CompatibilityError where a key of an adapter matches no tensor, or one of another shape, naming the nearest.
    """

    def __init__(self, base: Checkpoint, adapters: Sequence[tuple[LoraAdapter, float]]):
        self.base, self.adapters = base, tuple(adapters)
        self.path, self.directory, self.metadata = base.path, base.directory, base.metadata
        self.adapter_folders = tuple(adapter.path for adapter, _ in adapters)
        self.files = (*base.files, *(file for adapter, _ in adapters for file in adapter.files))
        self.changed: dict[str, list[tuple[LoraAdapter, float, LoraModule, bool]]] = {}
        self.replaced: dict[str, LoraAdapter] = {}
        for adapter, weight in adapters:
            self._apply(adapter, weight)
        self.tensors, self.aliases = self._names()
        self.config = self._untied_config()
        self._formed: dict[str, tuple[np.ndarray, np.ndarray, int]] = {}
        self._lock = threading.Lock()

    # What the adapters change

    def _apply(self, adapter: LoraAdapter, weight: float) -> None:
        for name in adapter.replaced:
            self._replace(adapter, weight, name)
        is_conv1d = [self._turns(adapter, module) for module in adapter.modules.values()]
        surprising = True in is_conv1d and not adapter.fan_in_fan_out
        for module, turns in zip(adapter.modules.values(), is_conv1d, strict=True):
            if turns is None:
                turns = adapter.fan_in_fan_out
                if surprising:
                    raise CompatibilityError(
                        str(adapter), f"fan_in_fan_out is false, but other weights lie as Conv1D's do; which way "
                        f"{module.tensor!r} lies, which is square, cannot be known", "Set it in adapter_config.json.",
                    )  # fmt: skip
            self.changed.setdefault(module.tensor, []).append((adapter, weight, module, turns))
        for name in self.replaced.keys() & self.changed.keys():
            info = self.replaced[name].info(name)
            if info.dtype not in MERGEABLE:
                raise CompatibilityError(str(info.file), f"{name!r} is {info.dtype}, expected {', '.join(MERGEABLE)}")

    def _replace(self, adapter: LoraAdapter, weight: float, name: str) -> None:
        found, mine = self._base_info(adapter, name, adapter.replaced[name]), adapter.info(name)
        if found.shape != mine.shape:
            raise self._misfit(adapter, adapter.replaced[name], list(mine.shape), name, found)
        if weight != 1:
            raise CompatibilityError(
                str(adapter),
                f"replaces {name!r} as a whole, so its weight in a list of adapters must be 1, got {weight:g}",
                "Give the weight as the model's parameter.",
            )
        if name in self.replaced:
            raise CompatibilityError(
                name, f"{self.replaced[name]} and {adapter} both replace it as a whole", "Merge them as two models."
            )
        self.replaced[name] = adapter

    def _turns(self, adapter: LoraAdapter, module: LoraModule) -> bool | None:
        """Whether the weight lies as (B A)^T; None where its shape does not tell."""
        found = self._base_info(adapter, module.tensor, module.A)
        if found.dtype not in MERGEABLE:
            raise CompatibilityError(
                str(found.file),
                f"{module.tensor!r} is {found.dtype}, expected {', '.join(MERGEABLE)} under an adapter",
                "Convert the base model first.",
            )
        lies = found.shape[0] if found.shape else 0, math.prod(found.shape[1:])
        straight, turned = lies == module.shape, lies == module.shape[::-1]
        if len(found.shape) < 2 or not (straight or turned) or (module.embedding and not turned):
            raise self._misfit(adapter, module.A, list(module.shape), module.tensor, found)
        if module.embedding:
            return True
        return None if straight and turned else turned

    def _base_info(self, adapter: LoraAdapter, name: str, key: str) -> TensorInfo:
        known = {*self.base.tensors, *self.base.aliases}
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, 0.0)
            raise CompatibilityError(
                str(adapter),
                f"{key!r} changes {name!r}, which {self.base.path} lacks; the nearest there is {near[0]!r}",
                "It belongs to another base model, or to a part of one.",
            )
        return self.base.tensors[self.base.aliases.get(name, name)]

    def _misfit(self, adapter, key: str, shape: list[int], name: str, found: TensorInfo) -> CompatibilityError:
        return CompatibilityError(
            str(adapter),
            f"{key!r} changes {name!r} as one of {shape}, but it is {list(found.shape)} in {self.base.path}",
            "It belongs to another base model.",
        )

    # Names and headers

    def _names(self) -> tuple[dict[str, AdaptedTensor | TensorInfo], dict[str, str]]:
        touched = {*self.changed, *self.replaced}
        tensors = {name: self._header(name, info) for name, info in self.base.tensors.items()}
        aliases = {}
        for alias, name in self.base.aliases.items():
            if touched & {alias, name}:
                tensors[alias] = self._header(alias, self.base.tensors[name])
            else:
                aliases[alias] = name
        return tensors, aliases

    def _header(self, name: str, info: TensorInfo) -> AdaptedTensor | TensorInfo:
        """The base's dtype and shape; the file is that of the adapter, which errors are to name."""
        changes = self.changed.get(name, ())
        if not changes and name not in self.replaced:
            return info if name == info.name else AdaptedTensor(name, info.dtype, info.shape, info.file)
        read = sum(a.stored_info(key).nbytes for a, _, m, _ in changes for key in (m.A, m.B))
        factors = sum(4 * m.rank * sum(m.shape) for _, _, m, _ in changes)
        if name not in self.replaced:
            return AdaptedTensor(name, info.dtype, info.shape, changes[0][0].files[0], read, factors)
        mine = self.replaced[name].info(name)
        return AdaptedTensor(name, mine.dtype, info.shape, mine.file, read, factors)

    def _untied_config(self) -> dict:
        config = dict(self.base.config)
        if config.get("tie_word_embeddings") and len(self.aliases) < len(self.base.aliases):
            config["tie_word_embeddings"] = False
        return config

    # Bytes

    def buffer(self, name: str, start: int = 0, stop: int | None = None) -> Buffer:
        """Elements [start, stop): of the base, of an adapter, or a FactorsBuffer over one of the two."""
        if name not in self.changed:
            return self._origin(name, start, stop)
        found = FactorsBuffer.of_panels(*self._sides(name), self._origin(name))
        return found.slice(start, found.size if stop is None else stop)

    def change(self, name: str, base: object, base_name: str) -> FactorsBuffer | None:
        """The change alone, where `base_name` of `base` is just what it is added to."""
        stored = self.base.aliases.get(name, name)
        is_same = base is self.base and self.base.aliases.get(base_name, base_name) == stored
        if not is_same or name not in self.changed or name in self.replaced:
            return None
        return FactorsBuffer.of_panels(*self._sides(name))

    def _origin(self, name: str, start: int = 0, stop: int | None = None) -> Buffer:
        return self.origin_of(name).buffer(name, start, stop)

    def origin_of(self, name: str) -> Checkpoint | LoraAdapter:
        """Whose bytes a tensor, or what a change is added to, is."""
        return self.replaced.get(name) or self.base

    def _sides(self, name: str) -> tuple[np.ndarray, np.ndarray, int]:
        """left [rows, ranks], right [ranks, columns] in panels, columns; all adapters side by side in their order."""
        with self._lock:
            if name not in self._formed:
                self._formed[name] = self._stacked(name)
            return self._formed[name]

    def _stacked(self, name: str) -> tuple[np.ndarray, np.ndarray, int]:
        changes = self.changed[name]
        ranks = sum(module.rank for _, _, module, _ in changes)
        first = changes[0]
        rows, columns = first[2].shape[::-1] if first[3] else first[2].shape
        lefts, rights, done = np.empty((rows, ranks), np.float32), empty_panels(ranks, columns), 0
        for adapter, weight, module, turns in changes:
            A, B = adapter.factors(module, copy=False)
            left, right = (A.T, B.T) if turns else (B, A)
            mine = slice(done, done + module.rank)
            np.multiply(left, weight * module.scaling, out=lefts[:, mine], dtype=np.float64, casting="same_kind")
            put_in_panels(rights, mine, right)
            done += module.rank
        return lefts, rights, columns

    def prepare(self, name: str) -> None:
        """Gets the factors of a changed tensor ready, ahead of `buffer`; any thread."""
        if name in self.changed:
            self._sides(name)

    def prefetch(self, name: str, start: int = 0, stop: int | None = None) -> None:
        if name not in self.replaced:
            self.base.prefetch(name, start, stop)

    def release(self, name: str) -> None:
        with self._lock:
            self._formed.pop(name, None)
        if name not in self.replaced:
            self.base.release(name)

    def companions(self) -> list[Path]:
        return self.base.companions()

    def close(self) -> None:
        self.base.close()
        for adapter, _ in self.adapters:
            adapter.stored.close()

    def __enter__(self) -> AdaptedCheckpoint:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def refuse_bare_adapter(path: Path) -> None:
    """Raises CompatibilityError where a model was expected and a folder holds an adapter alone."""
    if os.path.isfile(path / "adapter_config.json") and not os.path.isfile(path / "config.json"):
        raise CompatibilityError(
            str(path),
            "is an adapter, expected a model",
            f"Say what it is on: BASE+{path}, or use `peta-fast adapter merge`.",
        )
