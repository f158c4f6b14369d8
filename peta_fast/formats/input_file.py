"""Weight files as opened for reading: plain reads for headers, a read-only memory map for tensors.

Every failure is a CheckpointError that names the file, and no read takes more memory than the file has bytes.
"""

from __future__ import annotations

import os
import stat
import weakref
from pathlib import Path

from peta_fast.errors import CheckpointError
from peta_fast.formats import _libc

_PAGE = os.sysconf("SC_PAGESIZE")
_READ_AHEAD = 512 * 1024
"""Bytes for one call of advice: Linux reads at most max(read-ahead window, largest request of the disk) for each."""

_CONTENTS = {
    b"version https://git-lfs": "a git-lfs pointer, not the file itself",
    b"PK\x03\x04": "a zip archive, as torch.save writes it",
    b"\x80\x02\x8a\x0a": "a torch file from before torch 1.6",
    b"GGUF": "a GGUF file",
    b"\x89HDF": "an HDF5 file",
    b"\x1f\x8b": "a gzip archive",
    b"<!DOCTYPE": "a web page",
    b"<html": "a web page",
    bytes(16): "zeros, as an interrupted download leaves them",
}


class InputFile:
    """A regular file that is not empty and not a git-lfs pointer, open for reading; use it in a `with`.

    Raises CheckpointError when the path is anything else or cannot be read.
    """

    def __init__(self, path: Path):
        self.path = path
        self.raw = _open_regular(path)
        try:
            self.size = os.fstat(self.raw.fileno()).st_size
            self._refuse_placeholders()
        except BaseException:
            self.raw.close()
            raise

    def _refuse_placeholders(self) -> None:
        if self.size == 0:
            raise CheckpointError(str(self.path), "expected content, got an empty file", "Download it again.")
        if self.describe().startswith("a git-lfs pointer"):
            raise CheckpointError(
                str(self.path), f"expected content, got {self.describe()}", "Run `git lfs pull` in its folder."
            )

    def read(self, offset: int, size: int) -> bytes:
        """Bytes [offset, offset + size). Raises CheckpointError when the file ends before."""
        if not 0 <= offset <= offset + size <= self.size:
            raise CheckpointError(
                str(self.path), f"expected bytes {offset} to {offset + size}, but the file ends at {self.size}"
            )
        try:
            pieces, have = [], 0
            while have < size:
                piece = os.pread(self.raw.fileno(), size - have, offset + have)
                if not piece:
                    raise CheckpointError(str(self.path), f"became shorter than {self.size} bytes while it was read")
                pieces.append(piece)
                have += len(piece)
        except OSError as error:
            raise CheckpointError(str(self.path), f"cannot be read: {error.strerror or error}") from error
        return b"".join(pieces)

    def describe(self) -> str:
        """What the first bytes look like, for an error's "got"; empty when they say nothing."""
        head = self.read(0, min(self.size, 32))
        return next((meaning for magic, meaning in _CONTENTS.items() if head.startswith(magic)), "")

    def __enter__(self) -> InputFile:
        return self

    def __exit__(self, *_) -> None:
        self.raw.close()


class FileMap:
    """A whole file mapped read-only; unmapped when the last Buffer that owns it is gone.

    address  of the file's first byte
    size     bytes mapped
    Raises CheckpointError when the file cannot be mapped.
    """

    def __init__(self, path: Path):
        with InputFile(path) as source:
            self.size = source.size
            try:
                self.address = _libc.map_read_only(source.raw.fileno(), self.size)
            except OSError as error:
                raise CheckpointError(str(path), f"cannot be mapped into memory: {error.strerror}") from error
        weakref.finalize(self, _libc.unmap, self.address, self.size).atexit = False

    def prefetch(self, offset: int, size: int) -> None:
        """Ask the kernel to read bytes [offset, offset + size) ahead, and return."""
        start = offset - offset % _PAGE
        for position in range(start, min(offset + size, self.size), _READ_AHEAD):
            _libc.will_need(self.address + position, min(_READ_AHEAD, offset + size - position))

    def release(self, offset: int, size: int) -> None:
        """Unmap the pages that lie within bytes [offset, offset + size); what is touched again is mapped again."""
        start, stop = -(-offset // _PAGE) * _PAGE, (offset + size) // _PAGE * _PAGE
        if start < stop:
            _libc.will_not_need(self.address + start, stop - start)


def _open_regular(path: Path):
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISREG(mode):
            return open(path, "rb", buffering=0)
    except FileNotFoundError:
        target = f", it links to {os.readlink(path)!r}" if path.is_symlink() else ""
        raise CheckpointError(str(path), f"expected a file, found none{target}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(str(path), f"cannot be opened: {getattr(error, 'strerror', None) or error}") from error
    kind = "a directory" if stat.S_ISDIR(mode) else "a pipe, socket or device"
    raise CheckpointError(str(path), f"expected a regular file, got {kind}")
