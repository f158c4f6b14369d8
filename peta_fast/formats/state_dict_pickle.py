"""The pickle inside a torch file, read without running code: only what a state dict is made of has a meaning.

Three fences: opcodes outside `_OPCODES` are refused, so nothing is imported, instantiated or given attributes; a global
outside `_meaning` is refused by name; the few that are allowed stand for strings and for the functions below, which
only note what they are told. Lengths in the pickle cannot claim more memory than it has bytes.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any, NamedTuple

from peta_fast.buffers import SHORT_NAMES
from peta_fast.errors import CheckpointError
from peta_fast.formats.tensor_index import brief

_STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL", "ComplexFloatStorage": "C64",
}  # fmt: skip
"""torch's storage class -> dtype of its elements."""

_OPCODES = """
PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE
EMPTY_DICT EMPTY_LIST EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 SETITEM SETITEMS APPEND APPENDS
BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET GLOBAL STACK_GLOBAL BINPERSID REDUCE BUILD
""".split()


class Storage(NamedTuple):
    """Memory that tensors are views of: entry `key` of the archive, `size` elements of `dtype`."""

    key: str
    dtype: str
    size: int


class StoredTensor(NamedTuple):
    """A view of a storage; offset and stride count elements. Nothing in it has been checked."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple
    stride: tuple


def load_state_dict_pickle(pickled: bytes, file: Path) -> Any:
    """What the pickle holds, with a StoredTensor for each tensor.

    Raises CheckpointError for anything that is not plain data and tensors, and for a pickle that is malformed.
    """
    try:
        return _Reader(io.BytesIO(pickled), file).load()
    except CheckpointError:
        raise
    except Exception as error:  # a malformed pickle can fail at any opcode, with any exception
        raise CheckpointError(
            str(file), f"data.pkl is malformed: {type(error).__name__}: {brief(str(error))}", "Download it again."
        ) from error


class _AllowedOpcodes(dict):
    def __missing__(self, code: int):
        raise pickle.UnpicklingError(f"opcode {code:#04x} stands in no state dict")


class _Reader(pickle._Unpickler):  # the C class offers neither a choice of opcodes nor a bound on its memo
    dispatch = _AllowedOpcodes(
        (code, pickle._Unpickler.dispatch[code]) for code in (getattr(pickle, name)[0] for name in _OPCODES)
    )

    stack: list

    def __init__(self, pickled: io.BytesIO, file: Path):
        super().__init__(pickled)
        self.file = file

    def find_class(self, module: str, name: str):
        meaning = _meaning(module, name)
        if meaning is None:
            raise CheckpointError(
                str(self.file),
                f"refers to {brief(f'{module}.{name}')}, which is no part of a state dict; only weights are read",
                "If you trust the file, load it in torch and save the model's state_dict() with safetensors.",
            )
        return meaning

    def persistent_load(self, pid) -> Storage:
        kind, dtype, key, _location, size = pid
        if kind != "storage" or not all(type(text) is str for text in (dtype, key)) or type(size) is not int:
            raise pickle.UnpicklingError(f"expected a storage, got {brief(pid)}")
        return Storage(key, dtype, size)

    def load_build(self) -> None:
        """Attributes of a state dict (its version numbers) are dropped; nothing else here takes any."""
        self.stack.pop()
        if type(self.stack[-1]) is not dict:
            raise pickle.UnpicklingError(f"attributes for {brief(self.stack[-1])}")

    dispatch[pickle.BUILD[0]] = load_build


def _meaning(module: str, name: str):
    """What a global stands for; None for one that is refused."""
    if module == "torch":
        return _STORAGES.get(name) or SHORT_NAMES.get(name) or _FUNCTIONS.get((module, name))
    return _FUNCTIONS.get((module, name))


def _empty_dict() -> dict:
    return {}


def _size(dimensions: tuple = ()) -> tuple:
    return dimensions


def _tensor(storage, offset, shape, stride, requires_grad=False, hooks=None, metadata=None) -> StoredTensor:
    _refuse_metadata(metadata)
    return StoredTensor(storage, storage.dtype, offset, shape, stride)


def _tensor_of_dtype(storage, offset, shape, stride, requires_grad, hooks, dtype, metadata=None) -> StoredTensor:
    _refuse_metadata(metadata)
    return StoredTensor(storage, dtype, offset, shape, stride)


def _refuse_metadata(metadata) -> None:
    if metadata:
        raise pickle.UnpicklingError(f"a tensor with {brief(list(metadata))} set is not what its bytes say")


def _parameter(data, *_) -> StoredTensor:
    if type(data) is not StoredTensor:
        raise pickle.UnpicklingError(f"a parameter of {brief(data)}")
    return data


_FUNCTIONS = {
    ("collections", "OrderedDict"): _empty_dict,
    ("torch", "Size"): _size,
    ("torch.storage", "UntypedStorage"): "U8",
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_of_dtype,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
}
