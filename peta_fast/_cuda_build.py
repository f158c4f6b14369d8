"""Builds the CUDA library out of csrc/*/*.cu with nvcc. Stands alone: setup.py runs it before the package is there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

NAME = "libpeta_fast_cuda.so"
ARCHITECTURES = ("80", "86", "89", "90", "100", "120")
"""Compute capabilities that "on" builds for, with PTX of the last for those to come."""
OLDEST = 80
FLAGS = ("-std=c++17", "-O3", "--fmad=false", "-prec-div=true", "-ftz=false", "--expt-relaxed-constexpr", "-Xcompiler",
         "-fPIC,-fvisibility=hidden,-ffp-contract=off")  # fmt: skip
"""No contraction, no fast math: the results are the CPU's bit for bit."""


class BuildError(Exception):
    """Says what is missing, or what nvcc said."""


def find_nvcc() -> str | None:
    """CUDACXX, CUDA_HOME/bin, CUDA_PATH/bin, PATH, /usr/local/cuda/bin."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    named = [os.environ.get("CUDACXX"), *(os.path.join(h, "bin", "nvcc") for h in homes[:2] if h), "nvcc",
             os.path.join(homes[2], "bin", "nvcc")]  # fmt: skip
    return next((found for name in named if name and (found := shutil.which(name))), None)


def architectures_here() -> list[str]:
    """Compute capabilities of the GPUs of this machine, such as ["90"]; none where its driver shows none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    found = [line.strip().replace(".", "") for line in said.stdout.splitlines()] if said.returncode == 0 else []
    return sorted({a for a in found if a.isdigit()}, key=int)


def wanted_architectures(mode: str, given: str | None = None) -> list[str]:
    """What is given ("90", "80,90"), or PETA_FAST_CUDA_ARCHS; else, with "on", all; else those of the GPUs here."""
    said = os.environ.get("PETA_FAST_CUDA_ARCHS", "") if given is None else given
    found = [a.removeprefix("sm_").replace(".", "") for a in re.split(r"[\s,;]+", said) if a]
    if any(not re.fullmatch(r"\d{2,3}[af]?", a) for a in found):
        raise BuildError(f"PETA_FAST_CUDA_ARCHS: expected numbers such as 80,90, got {said!r}")
    if found:
        return found
    return list(ARCHITECTURES) if mode == "on" else architectures_here()


def code_flags(architectures: Sequence[str]) -> list[str]:
    """Machine code of each, and PTX of the last."""
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    return [*flags, f"-gencode=arch=compute_{architectures[-1]},code=compute_{architectures[-1]}"]


def sources(csrc: Path) -> list[Path]:
    return sorted(csrc.glob("*/*.cu"))


def build(csrc: Path, target: Path, architectures: Sequence[str], *, jobs: int = 0) -> None:
    """Compiles every source and links the library into `target`, which appears whole or not at all.

    Raises BuildError when nvcc or the sources are missing, or with what nvcc said.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise BuildError("nvcc was not found; install the CUDA toolkit, or set CUDA_HOME or CUDACXX")
    if not architectures:
        raise BuildError("no GPU was found to build for; set PETA_FAST_CUDA_ARCHS, such as 90")
    if old := [a for a in architectures if int(a.rstrip("af")) < OLDEST]:
        raise BuildError(f"the kernels need compute capability 8.0 or later, got {', '.join(old)}")
    files = sources(csrc)
    if not files:
        raise BuildError(f"{csrc} holds no sources of the CUDA library")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        objects = [Path(scratch) / f"{file.stem}.o" for file in files]

        def compile_one(pair: tuple[Path, Path]) -> None:
            _run([nvcc, *FLAGS, *code_flags(architectures), "-c", str(pair[0]), "-o", str(pair[1])])

        with ThreadPoolExecutor(jobs or min(os.cpu_count() or 1, len(files))) as executor:
            list(executor.map(compile_one, zip(files, objects, strict=True)))
        linked = Path(scratch) / NAME
        _run(
            [
                nvcc,
                "-shared",
                "-cudart",
                "static",
                *code_flags(architectures)[:1],
                "-o",
                str(linked),
                *map(str, objects),
            ]
        )
        os.replace(linked, target)


def _run(command: list[str]) -> None:
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        raise BuildError(
            f"{' '.join(command[:1])} ended with {ran.returncode}: {(ran.stderr or ran.stdout).strip()[-2000:]}"
        )


def ship(csrc: Path, folder: Path) -> None:
    """Copies what `build` needs into a folder, as the wheel carries it."""
    for file in [*csrc.glob("*.h"), *csrc.glob("*/*.h"), *csrc.glob("*/*.cu")]:
        place = folder / file.relative_to(csrc)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)
