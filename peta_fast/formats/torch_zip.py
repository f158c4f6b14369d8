"""torch.save's zip files (.bin, .pt, .pth, .ckpt): weights only, without torch.

    <root>/data.pkl      a state dict whose tensors refer to storages     (state_dict_pickle.py)
    <root>/data/<key>    a storage's bytes, uncompressed, so they can be mapped where they lie
    <root>/byteorder     "little"; absent up to torch 2.0

Source: torch.save's documentation, "Serialization semantics"; PKWARE APPNOTE 6.3.9 for the local header (30 bytes, then
name and extra field).
"""

from __future__ import annotations

import os
from pathlib import Path

from peta_fast.buffers import ITEMSIZE
from peta_fast.errors import CheckpointError
from peta_fast.formats.input_file import InputFile
from peta_fast.formats.state_dict_pickle import Storage, StoredTensor, load_state_dict_pickle
from peta_fast.formats.tensor_index import FileIndex, TensorInfo, brief, check_names, count_elements, name_some, quoted

_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt"}
_SCALARS = (str, int, float, bool, type(None))
_RESAVE = "Load it in torch and save the model's state_dict() with safetensors.torch.save_file."
_DOWNLOAD = "Download or save the file again."


def matches(path: Path) -> bool:
    return path.suffix in _SUFFIXES


def read_tensors(file: Path) -> FileIndex:
    """Index of the file, from its pickle alone; tensors come in the state dict's order.

    A tensor that is the same view of the same storage as an earlier one becomes its alias.
    Raises CheckpointError when the file is no zip of torch, holds more than one state dict, refers to code, or holds
    views that are not contiguous.
    """
    with InputFile(file) as source:
        archive = _Archive(source)
        loaded = load_state_dict_pickle(archive.read("data.pkl"), file)
        state_dict = _state_dict(file, loaded)
        check_names(file, state_dict)
        tensors: dict[str, TensorInfo] = {}
        aliases: dict[str, str] = {}
        views: dict[tuple, str] = {}
        for name, stored in state_dict.items():
            info = _tensor_info(archive, name, stored)
            first = views.setdefault((info.offset, info.dtype, info.shape), name) if info.size else name
            if first == name:
                tensors[name] = info
            else:
                aliases[name] = first
        archive.check_no_overlap()
    return FileIndex(file, tensors, {}, aliases)


class _Archive:
    """The zip's directory, and where its entries' bytes lie in the file."""

    def __init__(self, source: InputFile):
        self.source, self.file = source, source.path
        self.entries = _directory(source)
        self.root = _root(self.file, self.entries)
        self._ranges: dict[str, tuple[int, int]] = {}
        order = self.read("byteorder") if f"{self.root}byteorder" in self.entries else b"little"
        if order != b"little":
            raise CheckpointError(str(self.file), f"expected little-endian data, got {brief(order)}", _RESAVE)

    def read(self, name: str) -> bytes:
        return self.source.read(*self.range(name))

    def range(self, name: str) -> tuple[int, int]:
        """(offset, size) of an entry's bytes in the file."""
        if name not in self._ranges:
            self._ranges[name] = self._locate(name)
        return self._ranges[name]

    def _locate(self, name: str) -> tuple[int, int]:
        entry = self.entries.get(self.root + name)
        if entry is None:
            raise CheckpointError(str(self.file), f"expected an entry {brief(self.root + name)}, found none", _DOWNLOAD)
        if entry.compress_type != 0 or entry.flag_bits & 1 or entry.compress_size != entry.file_size:
            raise CheckpointError(
                str(self.file), f"{brief(self.root + name)} is compressed or encrypted; torch stores it plain", _RESAVE
            )
        local = self.source.read(entry.header_offset, 30)
        if not local.startswith(b"PK\x03\x04"):
            raise CheckpointError(str(self.file), f"no local header of {brief(self.root + name)} found", _DOWNLOAD)
        names = int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
        offset = entry.header_offset + 30 + names
        if offset + entry.file_size > self.source.size:
            raise CheckpointError(
                str(self.file),
                f"{brief(self.root + name)} ends at byte {offset + entry.file_size}, the file at {self.source.size}",
                _DOWNLOAD,
            )
        return offset, entry.file_size

    def check_no_overlap(self) -> None:
        """Raises CheckpointError when two of the entries that were asked for share bytes."""
        reached, previous = 0, ""
        for (offset, size), name in sorted((span, name) for name, span in self._ranges.items()):
            if offset < reached:
                raise CheckpointError(str(self.file), f"{brief(name)} and {brief(previous)} share bytes")
            reached, previous = offset + size, name


def _directory(source: InputFile) -> dict:
    """Entry name -> zipfile.ZipInfo."""
    import zipfile

    if not source.read(0, min(4, source.size)).startswith(b"PK\x03\x04"):
        raise _not_a_zip(source)
    try:
        with open(os.dup(source.raw.fileno()), "rb") as stream, zipfile.ZipFile(stream) as archive:
            entries = archive.infolist()
    except Exception as error:  # zipfile raises what its fields lead to: BadZipFile, struct.error, OverflowError, ...
        raise CheckpointError(
            str(source.path), f"its zip directory cannot be read, is it truncated? ({brief(str(error))})", _DOWNLOAD
        ) from error
    directory = {entry.filename: entry for entry in entries}
    if len(directory) != len(entries):
        raise CheckpointError(str(source.path), "two entries of the zip archive have the same name", _DOWNLOAD)
    return directory


def _not_a_zip(source: InputFile) -> CheckpointError:
    got = source.describe() or "a file that does not start like one"
    next_step = "torch.save(torch.load(file, weights_only=True), file) brings it up to date." if "1.6" in got else ""
    return CheckpointError(str(source.path), f"expected a zip archive as torch.save writes it, got {got}", next_step)


def _root(file: Path, entries: dict) -> str:
    """The folder of the archive, "<root>/"."""
    roots = [name[: -len("data.pkl")] for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(roots) != 1:
        raise CheckpointError(
            str(file),
            f"expected one entry <root>/data.pkl in the zip archive, got {len(roots)}: torch did not write it",
        )
    if f"{roots[0]}constants.pkl" in entries:
        raise CheckpointError(str(file), "expected a state dict, got a TorchScript program", _RESAVE)
    return roots[0]


def _state_dict(file: Path, loaded) -> dict[str, StoredTensor]:
    """The only dict of tensors: the object itself, or the one entry that is one. Scalars beside it are left out."""
    if not isinstance(loaded, dict):
        raise CheckpointError(str(file), f"expected a dict of tensors, got {_kind(loaded)}", _RESAVE)
    beside = {}
    if not _has_tensors(loaded):
        inner = {key: value for key, value in loaded.items() if _has_tensors(value)}
        if len(inner) != 1:
            got = f"the dicts {name_some(map(str, inner))}" if inner else "no tensor at all"
            raise CheckpointError(str(file), f"expected one dict of tensors, got {got}", _RESAVE)
        (chosen,) = inner
        beside = {key: value for key, value in loaded.items() if key != chosen}
        loaded = loaded[chosen]
    tensors = {key: value for key, value in loaded.items() if type(value) is StoredTensor}
    beside.update((key, value) for key, value in loaded.items() if type(value) is not StoredTensor)
    for key, value in beside.items():
        if not isinstance(value, _SCALARS) and not (isinstance(value, (dict, list, tuple)) and not value):
            raise CheckpointError(
                str(file), f"beside the weights stands {brief(key)}, {_kind(value)}: expected weights alone", _RESAVE
            )
    return tensors


def _has_tensors(value) -> bool:
    return isinstance(value, dict) and any(type(entry) is StoredTensor for entry in value.values())


def _kind(value) -> str:
    if type(value) is StoredTensor:
        return "a tensor"
    return f"a {type(value).__name__} of {len(value)}" if isinstance(value, (dict, list, tuple)) else brief(value)


def _tensor_info(archive: _Archive, name: str, stored: StoredTensor) -> TensorInfo:
    """Raises CheckpointError when the view leaves its storage, or its elements do not lie in one run."""
    file, (storage, dtype, start, shape, stride) = archive.file, stored
    if (type(storage), type(dtype), type(shape), type(stride)) != (Storage, str, tuple, tuple) or dtype not in ITEMSIZE:
        raise CheckpointError(str(file), f"{quoted(name)}: malformed tensor, {brief(stored)}", _DOWNLOAD)
    elements = count_elements(file, name, shape)
    if elements and not _is_contiguous(shape, stride):
        raise CheckpointError(
            str(file),
            f"{quoted(name)} must be contiguous, got a view of shape {brief(shape)}, strides {brief(stride)}",
            "Re-save with safetensors: save_file({k: v.contiguous() for k, v in state_dict.items()}, path).",
        )
    begin, end = _storage_range(archive, name, storage)
    offset = begin + start * ITEMSIZE[dtype] if type(start) is int else -1
    if not begin <= offset <= offset + elements * ITEMSIZE[dtype] <= end:
        raise CheckpointError(
            str(file), f"{quoted(name)}: {elements} elements from {brief(start)} on leave a storage of {storage.size}"
        )
    return TensorInfo(name, dtype, shape, file, offset)


def _storage_range(archive: _Archive, name: str, storage: Storage) -> tuple[int, int]:
    offset, size = archive.range(f"data/{storage.key}")
    if storage.dtype not in ITEMSIZE or storage.size * ITEMSIZE[storage.dtype] != size:
        raise CheckpointError(
            str(archive.file),
            f"{quoted(name)}: expected {brief(storage.size)} elements of {brief(storage.dtype)}, got {size} bytes",
            _DOWNLOAD,
        )
    return offset, offset + size


def _is_contiguous(shape: tuple, stride: tuple) -> bool:
    if len(shape) != len(stride):
        return False
    expected = 1
    for length, step in zip(reversed(shape), reversed(stride), strict=True):
        if length != 1 and step != expected:
            return False
        expected *= length
    return True
