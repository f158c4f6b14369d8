"""What writing to a disk needs besides the writing: free space, errors that say it, names that appear at once."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from peta_fast.errors import ResourceError

PARTIAL = ".partial"
"""Suffix of a file that is still being written."""

_NEXT_STEPS = {
    errno.ENOSPC: "Free some space, or write to another disk.",
    errno.EDQUOT: "Your quota is used up: delete files, or write to another disk.",
    errno.EROFS: "The filesystem is read-only: write to another place.",
    errno.EACCES: "You may not write there: change the permissions, or write to another place.",
    errno.EPERM: "You may not write there: change the permissions, or write to another place.",
    errno.EFBIG: "Lower --max-shard-size, or raise the limit on file sizes (`ulimit -f`).",
    errno.EIO: "The disk reports a defect: write to another one.",
    errno.ENOENT: "Create the output directory first.",
}


def free_bytes(directory: str | Path) -> int:
    """Bytes that this user may still write to the filesystem of `directory`, or of its nearest parent that exists."""
    directory = Path(directory).absolute()
    while not directory.exists() and directory != directory.parent:
        directory = directory.parent
    state = os.statvfs(directory)
    return state.f_bavail * state.f_frsize


def resource_error(path: Path, action: str, error: OSError) -> ResourceError:
    """The error for an output that failed: "cannot be <action>", why, and how much space is left."""
    try:
        space = f" ({free_bytes(path.parent):,} bytes free)"
    except OSError:
        space = ""
    return ResourceError(
        str(path), f"cannot be {action}: {error.strerror or error}{space}", _NEXT_STEPS.get(error.errno or 0, "")
    )


def sync_directory(directory: Path) -> None:
    """Make renames in `directory` survive a power cut, where the filesystem can."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def publish(partial: Path, final: Path) -> None:
    """Rename a finished file to its final name, durably. Raises ResourceError."""
    try:
        os.replace(partial, final)
        sync_directory(final.parent)
    except OSError as error:
        raise resource_error(final, "put in place", error) from error


def make_directory(directory: Path) -> None:
    """The directory and its parents, if they are not there. Raises ResourceError."""
    try:
        os.makedirs(directory, exist_ok=True)
    except OSError as error:
        raise resource_error(directory, "created", error) from error


def write_whole(path: Path, content: bytes) -> None:
    """Write a small file so that it is there whole or not at all, replacing what was there. Raises ResourceError."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        with open(partial, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise resource_error(path, "written", error) from error
    publish(partial, path)
