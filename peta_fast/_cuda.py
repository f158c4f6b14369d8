"""Finds and loads the CUDA library: one shared object with a C interface and no libtorch.

Looked for, in this order: PETA_FAST_CUDA_LIBRARY (a path; empty: none), beside the package, in the user's cache, where
`peta-fast build-cuda` puts it. PETA_FAST_CUDA=off keeps it from being used.
"""

from __future__ import annotations

import ctypes
import functools
import os
from ctypes import POINTER, c_char_p, c_double, c_int32, c_int64, c_uint64, c_void_p
from pathlib import Path

from peta_fast._cuda_build import NAME
from peta_fast.errors import PetaFastError, ResourceError

INTERFACE = 1
"""Of the library that this package speaks to; csrc/device/device.cu."""
PACKAGE = Path(__file__).resolve().parent


class Place(ctypes.Structure):
    """A device's number and a stream on it."""

    _fields_ = [("device", c_int32), ("stream", c_void_p)]


FUNCTIONS = {
    "peta_merge_tiles": (c_int64, [c_int32, c_void_p, c_int64]),
    "peta_merge_layout": (c_int32, [c_int32, c_void_p, c_int64, *[c_void_p] * 5]),
    "peta_delta_merge": (c_int32, [Place, *[c_void_p] * 5, c_int32]),
    "peta_set_thresholds": (c_int32, [Place, c_void_p, c_void_p, c_int64]),
    "peta_select_sizes": (None, [c_void_p, c_int64, c_void_p, c_int64, *[POINTER(c_int64)] * 3]),
    "peta_select_fill": (None, [c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_uint64]),
    "peta_select": (c_int32, [Place, c_void_p, c_void_p, c_void_p]),
    "peta_histogram": (c_int32, [Place, c_void_p, c_int64, c_int32, c_void_p]),
    "peta_row_bytes": (c_int64, [c_int64]),
    "peta_ranked_probability": (
        c_int32, [Place, c_void_p, c_int64, c_int64, c_int64, c_double, c_double, c_void_p, c_void_p],
    ),
    "peta_tree_sums": (c_int32, [Place, c_void_p, c_int64, c_int32, c_void_p, c_void_p]),
    "peta_task_statistics": (c_int32, [Place, c_void_p, c_int32, c_int64, *[c_void_p] * 5]),
    "peta_count_mask": (c_int32, [Place, c_void_p, c_int64, c_int32, c_void_p]),
    "peta_copy": (c_int32, [Place, c_void_p, c_void_p, c_int64]),
    "peta_backwards": (None, [c_int32]),
    "peta_error": (c_char_p, []),
    "peta_interface": (c_int32, []),
    "peta_kind": (c_char_p, []),
    "peta_toolkit": (c_int32, []),
}  # fmt: skip
"""Name -> (what it returns, what it takes). Tables are addresses: numpy's on the host, the device's on the device."""


class Library:
    """The loaded library.

    kind     "cuda", or "host" for the host build, whose device is the host's memory
    toolkit  CUDA's version that it was built with, such as "13.0"

    Raises PetaFastError when the file cannot be loaded or speaks another interface.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        hint = "Run `peta-fast build-cuda`."
        try:
            self.raw = ctypes.CDLL(str(path))
            found = self.raw.peta_interface()
        except (OSError, AttributeError) as error:
            raise PetaFastError(str(path), f"expected the CUDA library, got {error}", hint) from error
        if found != INTERFACE:
            raise PetaFastError(str(path), f"expected interface {INTERFACE}, got {found}", hint)
        for name, (result, arguments) in FUNCTIONS.items():
            function = getattr(self.raw, name)
            function.restype, function.argtypes = result, arguments
        self.kind = self.raw.peta_kind().decode()
        version = self.raw.peta_toolkit()
        self.toolkit = f"{version // 1000}.{version % 1000 // 10}" if version else ""

    def call(self, name: str, place: Place, *arguments) -> None:
        """Calls peta_<name>. Raises ResourceError with CUDA's message when it fails."""
        if getattr(self.raw, f"peta_{name}")(place, *arguments):
            message = self.raw.peta_error().decode(errors="replace")
            next_step = "Run `peta-fast build-cuda` on this machine." if "kernel image" in message else ""
            raise ResourceError(f"cuda:{place.device}" if self.kind == "cuda" else self.kind, message, next_step)


def cache_folder() -> Path:
    """Where `peta-fast build-cuda` puts libraries of this version, each in a folder named after its architectures."""
    from peta_fast import __version__

    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(root) / "peta_fast" / f"{__version__}-{INTERFACE}"


def source_folder() -> Path | None:
    """csrc, as the wheel carries it or beside the package in a checkout; None where it is neither."""
    places = (PACKAGE / "_csrc", PACKAGE.parent / "csrc")
    return next((place for place in places if (place / "device" / "device.cu").exists()), None)


def candidates() -> list[Path]:
    """Where a library may lie, the preferred first."""
    named = os.environ.get("PETA_FAST_CUDA_LIBRARY")
    if named is not None:
        return [Path(named)] if named else []
    built = sorted(cache_folder().glob(f"*/{NAME}"), key=lambda p: p.stat().st_mtime, reverse=True)
    return [p for p in (PACKAGE / NAME, *built) if p.exists()]


def mode() -> str:
    """PETA_FAST_CUDA: auto, on or off. Raises PetaFastError for anything else."""
    found = os.environ.get("PETA_FAST_CUDA", "auto")
    if found not in ("auto", "on", "off"):
        raise PetaFastError("PETA_FAST_CUDA", f"expected auto, on or off, got {found!r}")
    return found


@functools.cache
def library() -> Library | None:
    """The CUDA library, None where there is none or PETA_FAST_CUDA=off.

    Raises PetaFastError when one is there and cannot be used.
    """
    if mode() == "off":
        return None
    found = candidates()
    return Library(found[0]) if found else None


def require() -> Library:
    """The CUDA library. Raises ResourceError, with what to do, where there is none."""
    found = library()
    if found is None:
        why = "PETA_FAST_CUDA=off" if mode() == "off" else "it is not built"
        raise ResourceError("the CUDA library", f"expected it for tensors on a GPU, but {why}",
                            "Run `peta-fast build-cuda`, which needs nvcc, or merge on the CPU.")  # fmt: skip
    return found


def has_driver() -> bool:
    """Whether an NVIDIA driver is loaded, asked without loading CUDA."""
    return os.path.exists("/proc/driver/nvidia/version")


def describe() -> dict[str, str]:
    """What merges on a GPU and why, for `peta-fast doctor`."""
    try:
        found = library()
    except PetaFastError as error:
        return {"cuda library": "cannot be used", "cuda reason": str(error).replace("\n", " ")}
    if found is not None:
        version = f"CUDA {found.toolkit}" if found.toolkit else "the host build"
        return {"cuda library": str(found.path), "cuda reason": version}
    if mode() == "off":
        reason = "PETA_FAST_CUDA=off"
    elif has_driver():
        reason = "not built; run `peta-fast build-cuda`"
    else:
        reason = "not built, and no GPU is here"
    return {"cuda library": "none", "cuda reason": reason}
