"""The CUDA kernels compiled by g++ for the host, behind the same C interface, where every test can run them."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from peta_fast._cuda import NAME, Library
from peta_fast.ops.device import DeviceOps, HostMemory

CSRC = Path(__file__).resolve().parents[1] / "csrc"
FLAGS = ["-x", "c++", "-std=c++17", "-O2", "-g0", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall",
         "-Wextra", "-Werror", "-Wno-maybe-uninitialized"]  # fmt: skip
SANITIZER = os.environ.get("PETA_FAST_SANITIZE")
"""address or undefined, as tests/sanitize.sh has it, or nothing."""
if SANITIZER:
    FLAGS = [*FLAGS, f"-fsanitize={SANITIZER}", "-fno-omit-frame-pointer", "-g1", "-O1"]
HAS_COMPILER = shutil.which("g++") is not None and CSRC.is_dir()


def sources() -> list[Path]:
    return sorted(CSRC.glob("*/*.cu"))


@functools.cache
def host_library() -> Path:
    """Built once for these sources, wherever the tests run from."""
    files = [*sources(), *CSRC.glob("*.h"), *CSRC.glob("*/*.h")]
    digest = hashlib.sha256(b"".join(f.name.encode() + f.read_bytes() for f in sorted(files)) + str(FLAGS).encode())
    folder = Path(tempfile.gettempdir()) / f"peta_fast-{os.getuid()}-{digest.hexdigest()[:16]}"
    target = folder / NAME
    if not target.exists():
        with tempfile.TemporaryDirectory() as scratch:
            built = compile_into(Path(scratch))
            folder.mkdir(exist_ok=True)
            half = folder / f".{os.getpid()}"
            shutil.copyfile(built, half)
            os.replace(half, target)
    return target


def compile_into(folder: Path) -> Path:
    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        subprocess.run(["g++", *FLAGS, "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(2) as executor:
        objects = list(executor.map(compile_one, sources()))
    target = folder / NAME
    linked = [f"-fsanitize={SANITIZER}"] if SANITIZER else []
    subprocess.run(["g++", "-shared", *linked, "-o", target, *objects], check=True)
    return target


@functools.cache
def host_ops() -> DeviceOps:
    return DeviceOps(Library(host_library()), HostMemory())


@contextlib.contextmanager
def backwards() -> Iterator[None]:
    """Threads and blocks run in falling order: what then changes was a race."""
    raw = host_ops().library.raw
    raw.peta_backwards(1)
    try:
        yield
    finally:
        raw.peta_backwards(0)
