"""System calls that Python lacks, or makes with the interpreter lock held or with an open file kept.

Python's own mmap keeps a duplicate file descriptor per map: merging eight models of 163 shards would need 1,304, where
1,024 is the usual limit. Its madvise holds the interpreter lock. os.posix_fallocate writes a byte into every block
where the filesystem cannot reserve space.
"""

from __future__ import annotations

import ctypes
import errno
import os

_libc = ctypes.CDLL(None, use_errno=True)

_PROT_READ = 1
_MAP_SHARED = 1
_MADV_WILLNEED = 3
_MADV_DONTNEED = 4
_MAP_FAILED = ctypes.c_void_p(-1).value

_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
if hasattr(_libc, "fallocate"):
    _libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def map_read_only(descriptor: int, size: int) -> int:
    """Address of the file's first `size` bytes, mapped read-only. Raises OSError."""
    address = _libc.mmap(None, size, _PROT_READ, _MAP_SHARED, descriptor, 0)
    if address == _MAP_FAILED:
        raise _last_error()
    return address


def unmap(address: int, size: int) -> None:
    _libc.munmap(address, size)


def will_need(address: int, size: int) -> None:
    """Ask the kernel to read mapped pages ahead. It is advice: a refusal is no error."""
    _libc.madvise(address, size, _MADV_WILLNEED)


def will_not_need(address: int, size: int) -> None:
    """Take whole mapped pages out of this process's memory; they stay in the page cache and come back when touched."""
    _libc.madvise(address, size, _MADV_DONTNEED)


def reserve(descriptor: int, size: int) -> bool:
    """Give the file `size` bytes of disk, keeping what it holds. False where the filesystem cannot. Raises OSError."""
    if not hasattr(_libc, "fallocate"):
        return False
    while _libc.fallocate(descriptor, 0, 0, size):
        error = _last_error()
        if error.errno in (errno.EOPNOTSUPP, errno.ENOSYS):
            return False
        if error.errno != errno.EINTR:
            raise error
    return True


def _last_error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))
