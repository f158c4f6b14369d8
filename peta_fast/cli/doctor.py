"""`peta-fast doctor`: what is installed, what runs the operations, and why."""

from __future__ import annotations

from typing import Any

from peta_fast.cli._options import AsJson
from peta_fast.cli._text import print_facts, print_json, size_text

PACKAGES = ("numpy", "torch", "triton", "safetensors", "rich", "PyYAML", "huggingface_hub", "transformers")


def doctor(as_json: AsJson = False) -> int:
    """Print what is installed and what runs the operations."""
    found = findings()
    if as_json:
        print_json(found)
    else:
        print_facts({name: _text(name, value) for name, value in found.items()})
    return 0


def findings() -> dict[str, Any]:
    """Name -> what was found; sizes in bytes, None for what is not there. Imports neither torch nor triton."""
    import os
    import platform
    import tempfile

    from peta_fast import _cuda
    from peta_fast._native import describe
    from peta_fast.formats import free_bytes
    from peta_fast.formats.hub import cache_directory, is_offline

    return {
        "peta_fast": _version("peta_fast"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: _version(name) for name in PACKAGES},
        **describe(),
        **_cuda.describe(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": _memory(),
        "free disk here": free_bytes("."),
        "free disk for temporary files": free_bytes(tempfile.gettempdir()),
        "temporary files": tempfile.gettempdir(),
        "model cache": str(cache_directory()),
        "offline": is_offline(),
        "gpu": _gpu(),
    }


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _memory() -> int | None:
    """Bytes that programs may still take, page cache given up for them; None where the system does not say."""
    try:
        with open("/proc/meminfo") as lines:
            found = next(line for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    return int(found.split()[1]) * 1024


def _gpu() -> str:
    """Seen by its driver, not through torch, whose import takes seconds."""
    try:
        with open("/proc/driver/nvidia/version") as lines:
            driver = lines.readline().partition("Module")[2].split()[0]
    except (OSError, IndexError):
        return "none"
    return f"NVIDIA, driver {driver}"


def _text(name: str, value: Any) -> str:
    if value is None:
        return "unknown" if name == "memory" else "not installed"
    if name == "memory" or name.startswith("free disk"):
        return f"{size_text(value)} free"
    return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)
