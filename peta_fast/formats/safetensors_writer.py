"""safetensors shards written by position: the header is planned first, then bytes land where it says, in any order.

    <name>.partial: reserve -> header -> write(offset, bytes) from any thread -> sync -> rename to <name>

The header is padded with spaces so that data starts on a page. Page-aligned writes go past the page cache (O_DIRECT)
where the filesystem takes it: a merge's output is written once and not read, so caching it only evicts the inputs.
"""

from __future__ import annotations

import errno
import json
import math
import os
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from peta_fast.buffers import ITEMSIZE
from peta_fast.errors import CheckpointError, ResourceError
from peta_fast.formats import _libc, disk
from peta_fast.formats.safetensors import MAX_HEADER_BYTES
from peta_fast.formats.tensor_index import quoted

PAGE = 4096
"""Alignment of the data, and of every direct write."""


@dataclass(frozen=True)
class ShardLayout:
    """A file before its data is there.

    filename  final name
    header    u64 length and JSON, padded to a multiple of PAGE
    offsets   tensor name -> absolute byte offset in the file, ascending
    size      bytes of the whole file
    """

    filename: str
    header: bytes
    offsets: dict[str, int]
    size: int


def layout_shards(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]],
    *,
    max_shard_size: int,
    metadata: dict[str, str],
    stem: str = "model",
) -> list[ShardLayout]:
    """Where every tensor goes.

    tensors         (name, dtype, shape), kept in this order; only in a shard where that would leave a tensor unaligned
                    to its dtype do the larger dtypes come first
    max_shard_size  bytes of tensors a file; a larger tensor gets a file of its own
    metadata        text to text; {"format": "pt"} is added. An entry alias -> name goes to the shard that holds `name`

    Raises CheckpointError for a name that comes twice, ResourceError for a header above the format's limit.
    """
    groups = _group(tensors, max_shard_size)
    shard_of = _shard_of_each_name(groups, stem)
    layouts = []
    for number, group in enumerate(groups):
        suffix = "" if len(groups) == 1 else f"-{number + 1:05d}-of-{len(groups):05d}"
        text = {k: v for k, v in metadata.items() if k == "format" or shard_of.get(v, number) == number}
        layouts.append(_layout(f"{stem}{suffix}.safetensors", group, {"format": "pt", **text}))
    return layouts


def index_json(layouts: Sequence[ShardLayout]) -> str | None:
    """Text of `<stem>.safetensors.index.json`; None for one shard, which needs none."""
    if len(layouts) == 1:
        return None
    total_size = sum(layout.size - len(layout.header) for layout in layouts)
    weight_map = {name: layout.filename for layout in layouts for name in layout.offsets}
    content = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _group(tensors, max_shard_size: int) -> list[list[tuple[str, str, tuple[int, ...]]]]:
    groups: list[list] = [[]]
    filled = 0
    for name, dtype, shape in tensors:
        nbytes = math.prod(shape) * ITEMSIZE[dtype]
        if groups[-1] and filled + nbytes > max_shard_size:
            groups.append([])
            filled = 0
        groups[-1].append((name, dtype, tuple(shape)))
        filled += nbytes
    return groups


def _shard_of_each_name(groups: list, stem: str) -> dict[str, int]:
    shard_of: dict[str, int] = {}
    for number, group in enumerate(groups):
        for name, *_ in group:
            if name in shard_of:
                raise CheckpointError(f"{stem}.safetensors", f"{quoted(name)} would be stored twice")
            shard_of[name] = number
    return shard_of


def _layout(filename: str, group: list, metadata: dict[str, str]) -> ShardLayout:
    entries, size = _place(group)
    if any(entry["data_offsets"][0] % ITEMSIZE[entry["dtype"]] for entry in entries.values()):
        entries, size = _place(sorted(group, key=lambda tensor: -ITEMSIZE[tensor[1]]))
    header = _header(filename, {"__metadata__": metadata, **entries})
    offsets = {name: len(header) + entry["data_offsets"][0] for name, entry in entries.items()}
    return ShardLayout(filename, header, offsets, len(header) + size)


def _place(group: list) -> tuple[dict[str, dict], int]:
    """Header entries of tensors that follow one another, and the bytes they take."""
    entries, end = {}, 0
    for name, dtype, shape in group:
        begin, end = end, end + math.prod(shape) * ITEMSIZE[dtype]
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": (begin, end)}
    return entries, end


def _header(filename: str, content: dict) -> bytes:
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    length = _round_up(8 + len(text)) - 8
    if length > MAX_HEADER_BYTES:
        raise ResourceError(
            filename, f"its header would take {length} bytes, safetensors allows {MAX_HEADER_BYTES}",
            "Lower --max-shard-size.",
        )  # fmt: skip
    return length.to_bytes(8, "little") + text.ljust(length)


def _round_up(size: int) -> int:
    return -(-size // PAGE) * PAGE


class ShardWriter:
    """One shard on its way to the disk. Use it in a `with`: leaving it without publish() keeps the partial file.

    resume  keep what `<filename>.partial` holds already

    Raises ResourceError, naming the file and the free space, whenever the system refuses.
    """

    def __init__(self, layout: ShardLayout, directory: str | Path, *, resume: bool = False):
        self.layout = layout
        self.final = Path(directory) / layout.filename
        self.partial = self.final.with_name(layout.filename + disk.PARTIAL)
        self._room = _round_up(layout.size)
        self._synced = False
        self._closed = False
        self._closing = threading.Lock()
        try:
            self._buffered = os.open(self.partial, os.O_RDWR | os.O_CREAT | (0 if resume else os.O_TRUNC), 0o666)
        except OSError as error:
            raise self._error("created", error) from error
        self._direct = _open_direct(self.partial)
        self._takes_direct = True
        try:
            if not _libc.reserve(self._buffered, self._room):
                os.ftruncate(self._buffered, self._room)
            self._write_buffered(0, memoryview(layout.header))
        except OSError as error:
            self.close()
            if not resume:
                self.partial.unlink(missing_ok=True)
            raise self._error(f"given {self._room:,} bytes", error) from error

    def write(self, offset: int, data: memoryview) -> None:
        """Put bytes at `offset` of the file; any thread, any order, the interpreter lock released.

        A write is direct when offset, length and address are multiples of PAGE. Two writes must not meet in one page
        unless both are unaligned: the caller cuts at pages and pads the last slab, up to the page that ends the file.
        Raises ValueError outside of the file's data.
        """
        view = _bytes_of(data)
        if not len(self.layout.header) <= offset <= offset + len(view) <= self._room:
            raise ValueError(
                f"{self.final}: [{offset}, {offset + len(view)}) is outside the data "
                f"[{len(self.layout.header)}, {self._room})"
            )
        if self._closed:
            raise ValueError(f"{self.final}: already closed")
        self._synced = False
        try:
            done = 0
            if self._direct is not None and self._takes_direct and _is_aligned(offset, view):
                done = self._write_direct(self._direct, offset, view)
            self._write_buffered(offset + done, view[done:])
        except OSError as error:
            raise self._error("written", error) from error

    def sync(self) -> None:
        """Everything written is on the disk, and the file has its exact size, when this returns."""
        try:
            os.ftruncate(self._buffered, self.layout.size)
            os.fsync(self._buffered)
        except OSError as error:
            raise self._error("synced", error) from error
        self._synced = True

    def publish(self) -> None:
        """Sync if need be, close, and give the file its final name, replacing what bore it."""
        if not self._synced:
            self.sync()
        self.close()
        disk.publish(self.partial, self.final)

    def close(self) -> None:
        """Close the descriptors; the partial file stays. No thread may be writing."""
        with self._closing:
            if not self._closed:
                self._closed = True
                os.close(self._buffered)
                if self._direct is not None:
                    os.close(self._direct)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _write_direct(self, descriptor: int, offset: int, view: memoryview) -> int:
        """Bytes written, a multiple of PAGE; fewer than asked for when the filesystem takes no direct writes."""
        done = 0
        while done < len(view):
            try:
                written = os.pwrite(descriptor, view[done:], offset + done)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._takes_direct = False  # stays open: another thread may be using it
                return done
            if written < PAGE:
                return done
            done += written - written % PAGE
        return done

    def _write_buffered(self, offset: int, view: memoryview) -> None:
        while view:
            written = os.pwrite(self._buffered, view, offset)
            offset += written
            view = view[written:]

    def _error(self, action: str, error: OSError) -> ResourceError:
        return disk.resource_error(self.final, action, error)


def _open_direct(path: Path) -> int | None:
    """A descriptor past the page cache, or None where there is no such thing."""
    if not hasattr(os, "O_DIRECT"):
        return None
    try:
        return os.open(path, os.O_WRONLY | os.O_DIRECT)
    except OSError:
        return None


def _bytes_of(data) -> memoryview:
    view = memoryview(data)
    return view.cast("B") if view.nbytes else memoryview(b"")


def _is_aligned(offset: int, view: memoryview) -> bool:
    if offset % PAGE or len(view) % PAGE or not view:
        return False
    return np.frombuffer(view, np.uint8).__array_interface__["data"][0] % PAGE == 0
