"""Compiles the CUDA sources for GPUs that are not there, and reads what the compiler and the machine code say."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from host_build import CSRC, sources

from peta_fast._cuda_build import ARCHITECTURES, FLAGS, find_nvcc

STRICT = ("-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-Werror", "-Xptxas", "-v", "--threads", "2")
NVCC = find_nvcc() if CSRC.is_dir() else None


@dataclass(frozen=True)
class Kernel:
    """Registers a thread, bytes of stack and of spills a thread, bytes of shared memory a block."""

    name: str
    architecture: str
    registers: int
    stack: int
    spills: int
    shared: int


@dataclass(frozen=True)
class Build:
    source: Path
    object: Path
    kernels: tuple[Kernel, ...]


@functools.cache
def build(source: Path, folder: Path) -> Build:
    """One source for every target at once. Raises AssertionError with what nvcc said, warnings included."""
    target = folder / f"{source.stem}.o"
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    ran = subprocess.run([NVCC, *FLAGS, *STRICT, *codes, "-c", source, "-o", target], capture_output=True, text=True)
    said = ran.stdout + ran.stderr
    assert ran.returncode == 0, said[-3000:]
    return Build(source, target, tuple(kernels_of(said)))


def kernels_of(said: str) -> list[Kernel]:
    """What -Xptxas -v has printed."""
    found = []
    for part in re.split(r"Compiling entry function ", said)[1:]:
        name, architecture = re.match(r"'(\S+)' for 'sm_(\w+)'", part).groups()
        stack, stores, loads = map(int, re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part).groups())  # fmt: skip
        registers = int(re.search(r"Used (\d+) registers", part)[1])
        shared = re.search(r"(\d+) bytes smem", part)
        found.append(
            Kernel(short_name(name), architecture, registers, stack, stores + loads, int(shared[1]) if shared else 0)
        )
    return found


def short_name(mangled: str) -> str:
    """_ZN4peta10run_kernelINS_10PlainMergeILi2ELb1ELi3EEEEEvT_ -> PlainMerge<2,1,3>"""
    inner = re.search(r"run_kernelINS_\d+(\w+?)(?:I((?:L[ib]n?\d+E)+)E)?E+vT_", mangled)
    values = re.findall(r"L[ib](n?)(\d+)E", inner[2] or "")
    return inner[1] + (f"<{','.join(('-' if n else '') + v for n, v in values)}>" if values else "")


def disassembler() -> str | None:
    """cuobjdump of the toolkit, or the one that comes with triton."""
    found = shutil.which("cuobjdump")
    if found:
        return found
    try:
        import triton
    except ImportError:
        return None
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(tool) if tool.exists() else None


def machine_code(built: Build, architecture: str) -> dict[str, str]:
    """Name of a kernel -> its instructions."""
    command = [disassembler(), "-sass", "-arch", f"sm_{architecture}", built.object]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    parts = re.split(r"Function : (\S+)", text)[1:]
    return {short_name(name): code for name, code in zip(parts[::2], parts[1::2], strict=True)}


__all__ = [
    "ARCHITECTURES",
    "CSRC",
    "FLAGS",
    "NVCC",
    "Build",
    "Kernel",
    "build",
    "disassembler",
    "machine_code",
    "sources",
]
