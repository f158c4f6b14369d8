"""PEFT's LoRA adapters as they are found: what every key of the file means, and what it does to the base.

    dW = scaling B A            scaling = alpha / r, or alpha / sqrt(r) with rslora; both patterns by PEFT's rule
    <module>.lora_A.weight [r, in], .lora_B.weight [out, r]         Linear; Conv1D keeps its weight transposed
    <module>.lora_A.weight [r, in, h, w], .lora_B.weight [out, r, 1, 1]                             Conv2d
    <module>.lora_embedding_A [r, rows], .lora_embedding_B [width, r]     Embedding: dW = scaling (B A)^T
    anything else               a whole tensor in the place of the base's: modules_to_save, biases, embeddings

Names of adapters (lora_A.default.weight), base_layer and modules_to_save.<name> drop out of keys. DoRA and other
variants are refused by name, and so is every key that is none of these.
Source: PEFT 0.21, docs/source/developer_guides/checkpoint.md.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from peta_fast.buffers import Buffer
from peta_fast.errors import CheckpointError, CompatibilityError
from peta_fast.formats.checkpoint import Checkpoint, open_checkpoint
from peta_fast.formats.lora_config import pattern_value, read_config
from peta_fast.formats.peft_adapter import CONFIG, PREFIX
from peta_fast.formats.tensor_index import TensorInfo

FILES = ("adapter_model.safetensors", "adapter_model.bin")
_LINEAR = re.compile(r"(?P<module>.+)\.(?P<part>lora_[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
_EMBEDDING = re.compile(r"(?P<module>.+)\.(?P<part>lora_embedding_[AB])(?:\.(?P<adapter>[^.]+))?")
_VARIANT_KEYS = (
    "lora_magnitude_vector",
    "lora_",
    "trainable_tokens",
    "vera_",
    "hada_",
    "ia3_",
    "oft_",
    "boft_",
    "fourierft_",
    "prompt_embeddings",
)
"""Parts of keys that are neither plain LoRA nor whole tensors."""
_REPLACED_PART = re.compile(r"\.(?:base_layer|modules_to_save\.[^.]+)(?=\.)")


@dataclass(frozen=True)
class LoraModule:
    """One module's factors, as stored.

    name       of the module in the base model
    A, B       keys in the file
    rank, alpha, scaling
    embedding  whether dW is (B A)^T because the module is an Embedding
    shape      of B A once everything behind the first dimension is flattened: (out, in)
    stored     shapes of A and B in the file
    """

    name: str
    A: str
    B: str
    rank: int
    alpha: float
    scaling: float
    embedding: bool
    shape: tuple[int, int]
    stored: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())

    @property
    def tensor(self) -> str:
        """What it changes, by its name in the base."""
        return f"{self.name}.weight"


class LoraAdapter:
    """An adapter's config and headers; the numbers are mapped when they are asked for.

    path      as it was opened: the folder
    config    adapter_config.json
    modules   LoraModule by the module's name
    replaced  name of a tensor in the base -> its key here
    files     everything that the adapter's meaning depends on
    """

    def __init__(self, path: Path, config: Mapping[str, Any], stored: Checkpoint):
        self.path, self.config, self.stored = path, config, stored
        self.files = (*stored.files, path / CONFIG)
        self.modules: dict[str, LoraModule] = {}
        self.replaced: dict[str, str] = {}
        _Keys(self).read()

    def __str__(self) -> str:
        return str(self.path)

    @property
    def base_name(self) -> str | None:
        return self.config.get("base_model_name_or_path") or None

    @property
    def fan_in_fan_out(self) -> bool:
        return bool(self.config.get("fan_in_fan_out", False))

    def factors(self, module: LoraModule, *, copy: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """(A [r, in], B [out, r]), contiguous, fp64 as it is and everything else in fp32.

        copy  False leaves what needs no conversion where it is mapped, read-only
        Raises CheckpointError when one holds NaN or infinities.
        """
        return self._matrix(module.A, copy), self._matrix(module.B, copy)

    def _matrix(self, key: str, copy: bool) -> np.ndarray:
        info = self.stored_info(key)
        if info.dtype not in (*_NUMPY, "BF16"):
            raise CompatibilityError(
                str(info.file), f"{key!r} is {info.dtype}, expected F64, F32, F16 or BF16", "Convert it."
            )
        found = numbers(self.stored.buffer(key), copy).reshape(info.shape[0], math.prod(info.shape[1:]))
        with np.errstate(all="ignore"):
            suspicious = not np.isfinite(found.sum())  # a sum of finite numbers may overflow, too
        bad = int(np.count_nonzero(~np.isfinite(found))) if suspicious else 0
        if bad:
            raise CheckpointError(
                str(info.file), f"{key!r}: expected finite values, got {bad} NaN or inf", "Train or download it again."
            )
        return found

    def info(self, tensor: str) -> TensorInfo:
        """Of a tensor in `replaced`."""
        return self.stored_info(self.replaced[tensor])

    def stored_info(self, key: str) -> TensorInfo:
        """Of a key of the file."""
        return self.stored.tensors[self.stored.aliases.get(key, key)]

    def buffer(self, tensor: str, start: int = 0, stop: int | None = None) -> Buffer:
        """A tensor of `replaced`, mapped."""
        return self.stored.buffer(self.replaced[tensor], start, stop)

    def tensor_dtype(self) -> str:
        """What most of the factors are stored in."""
        return Counter(self.stored_info(m.A).dtype for m in self.modules.values()).most_common(1)[0][0]


def open_adapter(path: str | Path) -> LoraAdapter:
    """An adapter's folder. Raises CheckpointError for damaged files, CompatibilityError for variants of LoRA."""
    path = Path(path)
    config = read_config(path)
    stored = open_checkpoint(_weights(path))
    return LoraAdapter(path, config, stored)


def _weights(folder: Path) -> Path:
    found = [folder / name for name in FILES if (folder / name).exists()]
    if not found:
        raise CheckpointError(str(folder), f"expected {' or '.join(FILES)}, found neither", "Download it again.")
    return found[0]


class _Keys:
    """Reads what every key of a file means into its adapter."""

    def __init__(self, adapter: LoraAdapter):
        self.adapter, self.config = adapter, adapter.config
        self.file = str(adapter.stored.files[0])
        self.parts: dict[str, dict[str, str]] = {}
        self.names: set[str] = set()

    def read(self) -> None:
        for key in (*self.adapter.stored.tensors, *self.adapter.stored.aliases):
            self._sort(key)
        if len(self.names) > 1:
            raise CheckpointError(
                self.file,
                f"holds several adapters: {', '.join(sorted(self.names))}",
                "Save each to a folder of its own.",
            )
        for name, found in self.parts.items():
            self.adapter.modules[name] = self._module(name, found)
        if not self.adapter.modules:
            raise CheckpointError(self.file, "expected the factors of a LoRA adapter, found none", "Check the path.")

    def _sort(self, key: str) -> None:
        bare = key.removeprefix(PREFIX)
        match = _LINEAR.fullmatch(bare) or _EMBEDDING.fullmatch(bare)
        if match:
            if match["adapter"]:
                self.names.add(match["adapter"])
            self.parts.setdefault(match["module"].replace(".base_layer", ""), {})[match["part"]] = key
            return
        variant = next((part for part in _VARIANT_KEYS if part in bare), None)
        if variant:
            what = {"lora_magnitude_vector": "DoRA", "trainable_tokens": "trainable tokens"}.get(
                variant, "a variant of LoRA"
            )
            raise CompatibilityError(
                self.file, f"{key!r} belongs to {what}, expected plain LoRA", "Convert the adapter to plain LoRA first."
            )
        name = _REPLACED_PART.sub("", bare)
        if name in self.adapter.replaced:
            raise CheckpointError(self.file, f"{key!r} and {self.adapter.replaced[name]!r} are one tensor of the base")
        self.adapter.replaced[name] = key

    def _module(self, name: str, found: dict[str, str]) -> LoraModule:
        embedding = any(part.startswith("lora_embedding") for part in found)
        stem = "lora_embedding_" if embedding else "lora_"
        missing = [f"{stem}{side}" for side in "AB" if f"{stem}{side}" not in found]
        if missing or len(found) != 2:
            raise CheckpointError(
                self.file, f"{name!r} has {', '.join(sorted(found))}, expected {stem}A and {stem}B", "Save it again."
            )
        A, B = (found[f"{stem}{side}"] for side in "AB")
        a, b = (self.adapter.stored_info(key).shape for key in (A, B))
        if len(a) < 2 or len(a) != len(b) or any(n != 1 for n in b[2:]):
            raise CheckpointError(
                self.file, f"{name!r}: {A} is {list(a)} and {B} {list(b)}, expected [r, in], [out, r]"
            )
        rank = a[0]
        if rank < 1 or b[1] != rank:
            raise CheckpointError(
                self.file, f"{name!r}: {A} is {list(a)} and {B} {list(b)}, expected one rank of at least 1"
            )
        wanted = pattern_value(self.config.get("rank_pattern"), name, self._value("r"))
        if wanted != rank:
            raise CheckpointError(
                self.file, f"{name!r} has rank {rank}, but {CONFIG} says {wanted}", "Save both files together again."
            )
        alpha = pattern_value(self.config.get("alpha_pattern"), name, self._value("lora_alpha"))
        scaling = alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank
        return LoraModule(name, A, B, rank, alpha, scaling, embedding, (b[0], math.prod(a[1:])), (a, b))

    def _value(self, field: str) -> Any:
        """Of r or lora_alpha, which are 8 where the config does not say."""
        value = self.config.get(field)
        return 8 if value is None else value


_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}


def numbers(buffer: Buffer, copy: bool = True) -> np.ndarray:
    """[size] the elements: fp64 as it is, other floats in fp32; mapped where no copy is wanted or needed.

    Raises CompatibilityError for other dtypes.
    """
    raw = np.frombuffer(buffer.as_bytes(), np.uint8)
    if buffer.dtype == "BF16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    if buffer.dtype not in _NUMPY:
        raise CompatibilityError(
            "adapter", f"a tensor is {buffer.dtype}, expected F64, F32, F16 or BF16", "Convert it."
        )
    found = raw.view(_NUMPY[buffer.dtype])
    return found.astype(np.float64 if buffer.dtype == "F64" else np.float32, copy=copy)
