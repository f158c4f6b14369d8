"""What a number was measured on: machine, device, commit, date, versions. Part of every row."""

from __future__ import annotations

import datetime
import functools
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

PACKAGES = ("peta_fast", "numpy", "torch", "safetensors")
FOLDER = Path(__file__).resolve().parent


@functools.cache
def surroundings() -> dict:
    """The fields of a row that are the same for all rows of a run."""
    return {
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "device": "cpu",
        "versions": versions(),
    }


def machine() -> str:
    """Intel(R) Xeon(R) Processor @ 2.50GHz, 2 cores, 23 GiB, Linux 6.1"""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    cores = len(os.sched_getaffinity(0))
    release = ".".join(platform.release().split(".")[:2])
    return f"{_processor()}, {cores} cores, {memory:.0f} GiB, {platform.system()} {release}"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return " ".join(line.partition(":")[2].split())
    return platform.machine()


def commit() -> str:
    """Short hash of the source tree these benchmarks lie in, "+changes" where it differs; "unknown" without git."""
    try:
        changed = _git("status", "--porcelain", "--untracked-files=no")
        return _git("rev-parse", "--short=10", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*words: str) -> str:
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    done = subprocess.run(
        ["git", *words], cwd=FOLDER, env=environment, capture_output=True, text=True, check=True
    )  # fmt: skip
    return done.stdout.strip()


def versions() -> dict[str, str]:
    """Of Python, the packages that are there, and the instruction set the native module uses."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {**found, "simd": _simd()}


def _simd() -> str:
    from peta_fast._native import native

    module = native()
    return module.simd() if module else "plain"
