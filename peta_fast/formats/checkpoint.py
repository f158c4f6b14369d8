"""A checkpoint as the engine sees it: names, shapes and places of all tensors; bytes mapped when they are asked for.

Opening reads headers alone. Memory: about 700 bytes a tensor, whatever the tensors' sizes.
"""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path

from peta_fast.buffers import ITEMSIZE, Buffer
from peta_fast.errors import CheckpointError
from peta_fast.formats import shard_index
from peta_fast.formats._registry import is_weight_file, read_tensors
from peta_fast.formats.companions import companions_of
from peta_fast.formats.input_file import FileMap, InputFile
from peta_fast.formats.strict_json import parse_json
from peta_fast.formats.tensor_index import FileIndex, TensorInfo, name_some, quoted

STANDARD_NAMES = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
    "adapter_model.safetensors", "adapter_model.bin",
)  # fmt: skip
"""What a model directory's weights are called, the preferred first."""

_NO_WEIGHTS = ("training_args", "optimizer", "scheduler", "rng_state", "scaler")
"""How the files begin that trainers leave beside the weights."""
_PART = re.compile(r"-\d{5}-of-(?!00001)\d{5}$")
"""How the names of a model's parts end, before the suffix."""


def open_checkpoint(path: str | Path) -> Checkpoint:
    """A model directory, a weight file, or the index of a sharded checkpoint.

    Raises CheckpointError when there are no weights, when it is not clear which are meant, or when a file is damaged.
    """
    path = Path(path)
    file = find_weights(path) if os.path.isdir(path) else path
    if not file.name.endswith(shard_index.SUFFIX):
        return Checkpoint(path, file, [read_tensors(file)], {})
    index = shard_index.read_shard_index(file)
    shards = shard_index.read_shards(index)
    stored = {name: info for shard in shards for name, info in shard.tensors.items()}
    return Checkpoint(path, file, shards, shard_index.aliases_across(index, stored))


def find_weights(directory: Path) -> Path:
    """The weight file or index that a model directory means. Raises CheckpointError when none or several are there."""
    standard = [directory / name for name in STANDARD_NAMES if os.path.exists(directory / name)]
    if standard:
        _refuse_two_models(standard)
        return standard[0]
    entries = _entries(directory)
    indexes = [path for path in entries if path.name.endswith(shard_index.SUFFIX)]
    others = indexes or [path for path in entries if is_weight_file(path) and not path.name.startswith(_NO_WEIGHTS)]
    parts = [path.name for path in others if _PART.search(path.stem)]
    if parts:
        raise CheckpointError(
            str(directory), f"holds {parts[0]}, a part of a model, without the index of all parts",
            "Download the missing files, or name the weight file itself.",
        )  # fmt: skip
    if len(others) != 1:
        got = f"{len(others)} to choose from: {name_some(path.name for path in others)}" if others else "none"
        raise CheckpointError(
            str(directory), f"expected weights ({STANDARD_NAMES[0]}, an index, or one weight file), found {got}",
            "Name the weight file itself." if others else "Check the path, or download the model again.",
        )  # fmt: skip
    return others[0]


def _refuse_two_models(standard: list[Path]) -> None:
    """A single file and an index beside it that names other files are two models."""
    single, index = standard[0], standard[0].with_name(standard[0].name + shard_index.SUFFIX)
    if index in standard and set(shard_index.read_shard_index(index).names) != {single}:
        raise CheckpointError(
            str(single.parent), f"holds both {single.name} and {index.name}, which names other files",
            "Name the one that is meant.",
        )  # fmt: skip


def _entries(directory: Path) -> list[Path]:
    try:
        return sorted(path for path in directory.iterdir() if os.path.isfile(path))
    except OSError as error:
        raise CheckpointError(str(directory), f"cannot be listed: {error.strerror}") from error


class Checkpoint:
    """Tensors of one checkpoint, in one file or many.

    path       as it was opened
    directory  the model directory; None for a weight file by itself
    tensors    by name, in the files' order
    aliases    name of a tied tensor -> name it is stored under
    metadata   free text of the files' headers
    files      weight files, in order
    config     config.json of the model directory, {} where there is none

    Threads may share it. Use it in a `with`, or close() it; Buffers stay valid after that.
    """

    def __init__(self, path: Path, weights: Path, indexes: list[FileIndex], aliases: dict[str, str]):
        self.path = path
        self.files = tuple(index.file for index in indexes)
        self.tensors: dict[str, TensorInfo] = {}
        self.aliases: dict[str, str] = {}
        self.metadata: dict[str, str] = {}
        for index in indexes:
            self.tensors.update(index.tensors)
            self.aliases.update(index.aliases)
            self.metadata.update(index.metadata)
        self.aliases = {k: v for k, v in {**self.aliases, **aliases}.items() if k not in self.tensors}
        is_model = os.path.isdir(path) or weights.name in STANDARD_NAMES
        self.directory = weights.parent if is_model else None
        self.config = self._read_config()
        self._maps: dict[Path, FileMap] = {}
        self._lock = threading.Lock()

    def buffer(self, name: str, start: int = 0, stop: int | None = None) -> Buffer:
        """Elements [start, stop) of a tensor, mapped read-only: no copy, nothing is read until it is touched.

        Raises CheckpointError for a name that is not there or a file that has become shorter, IndexError for a range
        outside the tensor.
        """
        info, stop = self._range(name, start, stop)
        if start == stop:
            return Buffer(0, info.dtype, 0)
        mapped = self._map(info)
        return Buffer(mapped.address + info.offset + start * ITEMSIZE[info.dtype], info.dtype, stop - start, mapped)

    def prefetch(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """Ask the kernel to read elements [start, stop) ahead; returns without waiting for them."""
        info, stop = self._range(name, start, stop)
        if start != stop:
            itemsize = ITEMSIZE[info.dtype]
            self._map(info).prefetch(info.offset + start * itemsize, (stop - start) * itemsize)

    def release(self, name: str) -> None:
        """Take a tensor out of this process's memory, where its file is mapped; Buffers of it stay good."""
        info, _ = self._range(name, 0, None)
        mapped = self._maps.get(info.file)
        if mapped is not None:
            mapped.release(info.offset, info.nbytes)

    def companions(self) -> list[Path]:
        """The files of the model directory that belong beside the weights, config.json last."""
        return companions_of(self.directory) if self.directory else []

    def close(self) -> None:
        """Forget the maps; the memory goes when the last Buffer of it does."""
        with self._lock:
            self._maps.clear()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _range(self, name: str, start: int, stop: int | None) -> tuple[TensorInfo, int]:
        info = self.tensors.get(self.aliases.get(name, name))
        if info is None:
            raise CheckpointError(str(self.path), f"expected a tensor {quoted(name)}, found none")
        stop = info.size if stop is None else stop
        if not 0 <= start <= stop <= info.size:
            raise IndexError(f"[{start}, {stop}) is outside {name!r}, which has {info.size} elements")
        return info, stop

    def _map(self, info: TensorInfo) -> FileMap:
        mapped = self._maps.get(info.file)
        if mapped is None:
            with self._lock:
                mapped = self._maps.get(info.file) or FileMap(info.file)
                self._maps[info.file] = mapped
        if info.offset + info.nbytes > mapped.size:
            raise CheckpointError(str(info.file), f"{quoted(info.name)} is cut off: the file has become shorter")
        return mapped

    def _read_config(self) -> dict:
        file = self.directory / "config.json" if self.directory else None
        if file is None or not os.path.exists(file):
            return {}
        with InputFile(file) as source:
            config = parse_json(source.read(0, source.size), str(file), "the configuration", infinities=True)
        if not isinstance(config, dict):
            raise CheckpointError(str(file), f"expected a JSON object, got {type(config).__name__}")
        return config
