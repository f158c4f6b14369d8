"""Builds the native CPU module and, by PETA_FAST_CUDA=auto|on|off, the CUDA library.

A machine without a compiler gets the package all the same, with a loud warning.
"""

import importlib.util
import os
import platform
import sys
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

X86 = platform.machine() in ("x86_64", "AMD64")
FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=off", "-fno-trapping-math", "-Wall",
         "-Wextra", "-Wno-psabi", "-Wno-maybe-uninitialized"]  # fmt: skip
VARIANT_FLAGS = {
    "_avx2.cpp": ["-mavx2", "-mfma", "-mf16c", "-mpopcnt", "-mbmi"],
    "_avx512.cpp": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mf16c", "-mpopcnt", "-mbmi",
                    "-mprefer-vector-width=512"],
}  # fmt: skip


def sources():
    found = sorted(glob("csrc/*.cpp") + glob("csrc/*/*.cpp"))
    return found if X86 else [s for s in found if not s.endswith(tuple(VARIANT_FLAGS))]


def load_cuda_build():
    """peta_fast/_cuda_build.py alone: the package cannot be imported yet."""
    spec = importlib.util.spec_from_file_location("_cuda_build", Path("peta_fast", "_cuda_build.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_cuda(folder):
    """auto: for the GPU that is here, or PETA_FAST_CUDA_ARCHS, where nvcc is; on: for all or fail; off: not."""
    mode = os.environ.get("PETA_FAST_CUDA", "auto")
    if mode not in ("auto", "on", "off"):
        raise SystemExit(f"PETA_FAST_CUDA: expected auto, on or off, got {mode!r}")
    cuda = load_cuda_build()
    if mode == "off" or (mode == "auto" and not cuda.find_nvcc()):
        return
    try:
        architectures = cuda.wanted_architectures(mode)
        if mode == "auto" and not architectures:
            return
        print(f"building the CUDA library for sm_{', sm_'.join(architectures)}", file=sys.stderr)
        cuda.build(Path("csrc"), Path(folder) / cuda.NAME, architectures)
    except cuda.BuildError as error:
        if mode == "on":
            raise SystemExit(f"PETA_FAST_CUDA=on: {error}") from error
        print(f"peta_fast: no CUDA library; merging runs on the CPU. {error}", file=sys.stderr)


class ShipSources(build_py):
    """The CUDA sources go into the wheel, so that `peta-fast build-cuda` works after an install."""

    def run(self):
        super().run()
        if not self.editable_mode:
            load_cuda_build().ship(Path("csrc"), Path(self.build_lib) / "peta_fast" / "_csrc")


class BuildNative(build_ext):
    def build_extensions(self):
        compile_one = self.compiler._compile

        def with_variant_flags(obj, src, ext, cc_args, extra, pp_opts):
            extra = extra + next((flags for end, flags in VARIANT_FLAGS.items() if src.endswith(end)), [])
            compile_one(obj, src, ext, cc_args, extra, pp_opts)

        self.compiler._compile = with_variant_flags
        super().build_extensions()

    def run(self):
        self.run_cpu()
        build_cuda(Path("peta_fast") if self.inplace else Path(self.build_lib) / "peta_fast")

    def run_cpu(self):
        try:
            super().run()
        except Exception as error:
            if os.environ.get("PETA_FAST_NATIVE") == "require":
                raise
            banner = "*" * 88
            print(
                f"{banner}\npeta_fast: the native module could not be built, and merging will be many times slower.\n"
                f"Install g++ and Python's headers and reinstall. The compiler said: {error}\n{banner}",
                file=sys.stderr,
            )


sanitize = os.environ.get("PETA_FAST_SANITIZE", "")
if sanitize:
    FLAGS += [f"-fsanitize={sanitize}", "-fno-omit-frame-pointer", "-g1", "-O1"]

import pybind11  # noqa: E402

native = Extension(
    "peta_fast._cpu",
    sources(),
    include_dirs=["csrc", pybind11.get_include()],
    depends=sorted(glob("csrc/*.h") + glob("csrc/*/*.h")),
    define_macros=[("PETA_X86_VARIANTS", None)] if X86 else [],
    extra_compile_args=FLAGS,
    extra_link_args=[f"-fsanitize={sanitize}"] if sanitize else [],
    language="c++",
)

ParallelCompile("PETA_FAST_BUILD_JOBS", default=0).install()
setup(ext_modules=[native], cmdclass={"build_ext": BuildNative, "build_py": ShipSources})
