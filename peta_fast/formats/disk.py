"""What writing to a disk needs besides the writing: free space, errors that say it, names that appear at once."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Callable, Iterable, Mapping
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
    errno.ELOOP: "It is a link that leads to itself: name another place.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
    errno.EISDIR: "A folder is in the way: move it, or write to another place.",
    errno.ENOTDIR: "A file is in the way: move it, or write to another place.",
    errno.EEXIST: "A file or a broken link is in the way: move it, or write to another place.",
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
    return ResourceError(str(path), f"cannot be {action}: {error.strerror or error}{space}", next_step(error))


def next_step(error: OSError) -> str:
    """What helps against it; empty where that is not known."""
    return _NEXT_STEPS.get(error.errno or 0, "")


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
    write_file(path, lambda partial: partial.write_bytes(content))


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """write(partial), then the final name: a file of that name is always whole. Raises ResourceError."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        _write_synced(partial, write)
    except BaseException as error:
        found = resource_error(path, "written", error) if isinstance(error, OSError) else None
        _unlink(partial)
        if found is not None:
            raise found from error
        raise
    publish(partial, path)


def write_together(
    folder: Path, files: Mapping[str, bytes | Callable[[Path], object]], old: Iterable[str] = ()
) -> None:
    """Writes all of these files, or none: what the folder holds stays until the last of them is on the disk.

    files  name -> its content, or what writes it to a path. The last one is what makes the others be found: it loses
           its old file first and gets its name last
    old    names of other files that what was there had

    Raises ResourceError; partial files, and a folder that was made for them, are gone then.
    """
    partials = {name: folder / (name + PARTIAL) for name in files}
    made = _missing(folder)
    try:
        os.makedirs(folder, exist_ok=True)
        for name, content in files.items():
            _refuse_folder(folder / name)
            _write_synced(partials[name], content if callable(content) else _writer(content))
    except BaseException as error:
        found = resource_error(folder, "written", error) if isinstance(error, OSError) else None  # with the room left
        for path in partials.values():
            _unlink(path)
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()
        if found is not None:
            raise found from error
        raise
    try:
        for name in (*reversed(files), *old):
            (folder / name).unlink(missing_ok=True)
        for name, partial in partials.items():
            os.replace(partial, folder / name)
        sync_directory(folder)
    except OSError as error:
        raise resource_error(folder, "completed", error) from error


def save_tensors(tensors: Mapping[str, object], path: Path, metadata: Mapping[str, str]) -> None:
    """safetensors' own writer of torch tensors. Raises OSError, as every other way to write a file does."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), path, metadata=dict(metadata))
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def real_path(path: str | Path) -> Path:
    """The absolute path without links that comparisons of inputs and outputs use; where links lead to themselves, as
    far as it can be followed."""
    return Path(os.path.realpath(os.path.expanduser(path)))


def _write_synced(path: Path, write: Callable[[Path], object]) -> None:
    write(path)
    with open(path, "rb+") as written:
        os.fsync(written.fileno())


def _writer(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def _refuse_folder(path: Path) -> None:
    if path.is_dir():
        raise OSError(errno.EISDIR, f"{path.name} is a folder")


def _unlink(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def _missing(folder: Path) -> list[Path]:
    """Folders that making this one makes, the innermost first."""
    found = []
    while not os.path.lexists(folder) and folder != folder.parent:
        found.append(folder)
        folder = folder.parent
    return found
