"""Weight files built byte by byte, so that each can be wrong in one way; and the bytes of a tensor as we read them."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from peta_fast.errors import CheckpointError
from peta_fast.formats import Checkpoint, open_checkpoint


def safetensors_bytes(header: dict | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file; `length` lies about the header's."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(begin: int, end: int, shape: list | None = None, dtype: str = "F32") -> dict:
    """A header's entry: one-dimensional fp32 unless told."""
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


def write_safetensors(path: Path, names: list[str], metadata: dict | None = None) -> Path:
    """A sound file with one fp32 pair for each name."""
    header = {name: entry(8 * i, 8 * i + 8) for i, name in enumerate(names)}
    path.write_bytes(safetensors_bytes({"__metadata__": metadata or {}, **header}, bytes(8 * len(names))))
    return path


class Global:
    """A name that a pickle refers to."""

    def __init__(self, module: str, name: str):
        self.module, self.name = module, name


class Call:
    """A call that a pickle makes."""

    def __init__(self, function: Global, *arguments):
        self.function, self.arguments = function, arguments


class Stored:
    """What torch pickles by reference: ("storage", type, key, location, size)."""

    def __init__(self, *reference):
        self.reference = reference


class _StateDictPickler(pickle._Pickler):
    """Protocol 2 with the three notions above."""

    dispatch = dict(pickle._Pickler.dispatch)

    def __init__(self, stream):
        super().__init__(stream, protocol=2)

    def save_global_name(self, obj: Global) -> None:
        self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())

    def save_call(self, obj: Call) -> None:
        self.save(obj.function)
        self.save(obj.arguments)
        self.write(pickle.REDUCE)

    def persistent_id(self, obj):
        return obj.reference if isinstance(obj, Stored) else None

    dispatch[Global] = save_global_name
    dispatch[Call] = save_call


def pickled(obj) -> bytes:
    stream = io.BytesIO()
    _StateDictPickler(stream).dump(obj)
    return stream.getvalue()


def float_tensor(key: str = "0", size: int = 4, offset=0, shape=(4,), stride=(1,), storage=None) -> Call:
    """A pickled fp32 tensor, as torch writes it: a view of storage `key`."""
    if storage is None:
        storage = Stored("storage", Global("torch", "FloatStorage"), key, "cpu", size)
    rebuild = Global("torch._utils", "_rebuild_tensor_v2")
    return Call(rebuild, storage, offset, shape, stride, False, Call(Global("collections", "OrderedDict")))


def torch_zip_bytes(state, storages: dict[str, bytes] | None = None, extra=(), compression=zipfile.ZIP_STORED) -> bytes:
    """A torch zip file. state: an object for `pickled`, or a pickle's bytes; extra: (entry name, content) pairs."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        archive.writestr("archive/data.pkl", state if isinstance(state, bytes) else pickled(state))
        for key, content in ({"0": bytes(16)} if storages is None else storages).items():
            archive.writestr(f"archive/data/{key}", content)
        for name, content in extra:
            archive.writestr(name, content)
    return stream.getvalue()


def tensor_bytes(checkpoint: Checkpoint, name: str) -> bytes:
    return bytes(checkpoint.buffer(name).as_bytes())


def raw(tensor: torch.Tensor) -> bytes:
    """A tensor's bytes in row-major order, by torch alone."""
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


def refused(path: Path, *words: str) -> CheckpointError:
    """Opening `path` must raise a CheckpointError that says all of `words`."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    missing = [word for word in words if word not in message]
    assert not missing, f"{message!r} does not say {missing}"
    return caught.value
