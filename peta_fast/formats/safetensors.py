"""safetensors: u64 header length, JSON header, data without holes.

    | n: u64 little-endian | n bytes {"name": {"dtype", "shape", "data_offsets": [begin, end]}, ...} | data |

Only the header is read; the data is mapped when a tensor is asked for. Offsets count from the end of the header.
Source: https://github.com/huggingface/safetensors, section "Format".
"""

from __future__ import annotations

from operator import itemgetter
from pathlib import Path

from peta_fast.buffers import ITEMSIZE
from peta_fast.errors import CheckpointError
from peta_fast.formats.input_file import InputFile
from peta_fast.formats.strict_json import parse_json
from peta_fast.formats.tensor_index import (
    FileIndex,
    TensorInfo,
    brief,
    check_names,
    count_elements,
    quoted,
    split_aliases,
)

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""

_FIELDS = {"dtype", "shape", "data_offsets"}
_DOWNLOAD = "Download or save the file again."


def matches(path: Path) -> bool:
    return path.suffix == ".safetensors"


def read_tensors(file: Path) -> FileIndex:
    """Index of the file, from its header alone; tensors come in the order of their bytes.

    Raises CheckpointError, naming file and tensor, when the header does not describe exactly the bytes that follow it.
    """
    with InputFile(file) as source:
        header, data_start = _read_header(source)
        data_size = source.size - data_start
    metadata = _text_entries(file, header.pop("__metadata__", None))
    check_names(file, header)
    spans = sorted((_span(file, name, entry) for name, entry in header.items()), key=itemgetter(0, 1))
    _check_no_holes(file, spans, data_size)
    tensors = {name: TensorInfo(name, dtype, shape, file, data_start + begin) for begin, _, name, dtype, shape in spans}
    aliases, metadata = split_aliases(metadata, tensors)
    return FileIndex(file, tensors, metadata, aliases)


def _read_header(source: InputFile) -> tuple[dict, int]:
    """The header's JSON object, and where the data starts."""
    who = str(source.path)
    if source.size < 8:
        raise CheckpointError(who, f"expected at least 8 bytes of safetensors, got {source.size}", _DOWNLOAD)
    length = int.from_bytes(source.read(0, 8), "little")
    if length > min(MAX_HEADER_BYTES, source.size - 8):
        raise _wrong_length(source, length)
    text = source.read(8, length)
    if not text.startswith(b"{"):
        raise CheckpointError(
            who, f"expected a header that starts with '{{', got {source.describe() or brief(text[:8])}"
        )
    header = parse_json(text, who, "the header")
    return header, 8 + length


def _wrong_length(source: InputFile, length: int) -> CheckpointError:
    got = source.describe()
    if got:
        return CheckpointError(str(source.path), f"expected safetensors, got {got}")
    return CheckpointError(
        str(source.path),
        f"the header must be at most {MAX_HEADER_BYTES} bytes long and lie inside the file, "
        f"got a length of {length} with {source.size - 8} bytes after it",
        _DOWNLOAD,
    )


def _text_entries(file: Path, metadata) -> dict[str, str]:
    if metadata is None:
        return {}
    if not isinstance(metadata, dict) or not all(type(value) is str for value in metadata.values()):
        raise CheckpointError(str(file), f"'__metadata__' must map text to text, got {brief(metadata)}")
    return metadata


def _span(file: Path, name: str, entry) -> tuple[int, int, str, str, tuple[int, ...]]:
    """(begin, end, name, dtype, shape) of one entry, checked as far as it can be by itself."""
    if type(entry) is not dict or entry.keys() != _FIELDS:
        got = f"the keys {brief(sorted(entry))}" if type(entry) is dict else brief(entry)
        raise CheckpointError(str(file), f"{quoted(name)}: expected dtype, shape and data_offsets, got {got}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if type(dtype) is not str or dtype not in ITEMSIZE:
        raise CheckpointError(
            str(file), f"{quoted(name)}: dtype {brief(dtype)} is not supported, only {', '.join(ITEMSIZE)} are"
        )
    if type(shape) is not list:
        raise CheckpointError(str(file), f"{quoted(name)}: shape must be a list of sizes, got {brief(shape)}")
    begin, end = _offsets(file, name, offsets)
    nbytes = count_elements(file, name, shape) * ITEMSIZE[dtype]
    if end - begin != nbytes:
        raise CheckpointError(
            str(file),
            f"{quoted(name)}: {dtype} of shape {brief(shape)} takes {nbytes} bytes, got {end - begin} in the file",
        )
    return begin, end, name, dtype, tuple(shape)


def _offsets(file: Path, name: str, offsets) -> tuple[int, int]:
    if type(offsets) is list and len(offsets) == 2:
        begin, end = offsets
        if type(begin) is int and type(end) is int and 0 <= begin <= end:
            return begin, end
    raise CheckpointError(
        str(file), f"{quoted(name)}: data_offsets must be [begin, end] with 0 <= begin <= end, got {brief(offsets)}"
    )


def _check_no_holes(file: Path, spans: list, data_size: int) -> None:
    """spans, sorted, must cover [0, data_size) once."""
    reached, previous = 0, ""
    for begin, end, name, *_ in spans:
        if end > data_size:
            raise CheckpointError(
                str(file),
                f"{quoted(name)} ends at byte {end} of the data, but the file holds {data_size}: it is truncated",
                _DOWNLOAD,
            )
        if begin < reached:
            raise CheckpointError(
                str(file), f"{quoted(name)} starts at byte {begin}, inside {quoted(previous)} (ends at {reached})"
            )
        if begin > reached:
            raise CheckpointError(str(file), f"{begin - reached} bytes before {quoted(name)} belong to no tensor")
        reached, previous = end, name
    if reached != data_size:
        raise CheckpointError(str(file), f"{data_size - reached} bytes after the last tensor belong to no tensor")
