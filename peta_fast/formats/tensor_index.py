"""What a weight file holds, known from its header alone: names, dtypes, shapes and where the bytes lie."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from peta_fast.buffers import ITEMSIZE
from peta_fast.errors import CheckpointError

MAX_ELEMENTS = 2**63 - 1
"""Largest size that every consumer can hold in an int64."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One stored tensor.

    dtype   a key of buffers.ITEMSIZE
    shape   row-major, contiguous
    offset  absolute, in bytes from the start of `file`; old files may leave it unaligned to the dtype
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


@dataclass(frozen=True)
class FileIndex:
    """The tensors of one weight file.

    tensors   by name, in the file's order
    metadata  free text of the file, the entries that name aliases taken out
    aliases   name of a tied tensor -> name it is stored under
    """

    file: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    aliases: dict[str, str]


def split_aliases(metadata: dict[str, str], names) -> tuple[dict[str, str], dict[str, str]]:
    """(aliases, remaining metadata): an entry whose value is a stored name and whose key is not one ties two tensors.

    That is how safetensors.torch.save_model and huggingface_hub note the tensors they leave out.
    """
    aliases = {k: v for k, v in metadata.items() if k != "format" and v in names and k not in names}
    return aliases, {k: v for k, v in metadata.items() if k not in aliases}


def count_elements(file: Path, name: str, shape) -> int:
    """Product of the dimensions. Raises CheckpointError when one is no size, or the product exceeds 2^63 - 1."""
    count = 1
    for dimension in shape:
        if type(dimension) is not int or not 0 <= dimension <= MAX_ELEMENTS:
            raise CheckpointError(
                str(file), f"{quoted(name)}: a dimension must be an integer from 0 to 2^63 - 1, got {brief(dimension)}"
            )
        count *= dimension
        if count > MAX_ELEMENTS:
            raise CheckpointError(str(file), f"{quoted(name)}: shape {brief(shape)} has more than 2^63 - 1 elements")
    return count


def check_names(file: Path, names) -> None:
    """Raises CheckpointError when a name is not text, which no other file or message could carry."""
    try:
        "\0".join(names).encode()
    except (TypeError, UnicodeEncodeError):
        wrong = next(name for name in names if not _is_text(name))
        raise CheckpointError(str(file), f"a tensor's name must be Unicode text, got {brief(wrong)}") from None


def _is_text(name) -> bool:
    return isinstance(name, str) and not any("\ud800" <= letter <= "\udfff" for letter in name)


def brief(value, limit: int = 80) -> str:
    """ASCII repr of a value out of an untrusted file, cut to `limit` characters without building a long one first."""
    if isinstance(value, (str, bytes, list, tuple)):
        value = value[:limit]
    elif isinstance(value, dict):
        return f"an object with {len(value)} keys"
    elif isinstance(value, int) and value.bit_length() > 4 * limit:
        return f"an integer of {value.bit_length()} bits"
    text = ascii(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def quoted(name) -> str:
    """A tensor's name as errors show it."""
    return brief(name, 300)


def name_some(names, limit: int = 3) -> str:
    """'a', 'b', 'c' and 5 more"""
    names = sorted(names)
    listed = ", ".join(quoted(name) for name in names[:limit])
    return listed if len(names) <= limit else f"{listed} and {len(names) - limit} more"
