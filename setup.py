"""Builds the native CPU module. A machine without a compiler gets the package all the same, with a loud warning."""

import os
import platform
import sys
from glob import glob

from pybind11.setup_helpers import ParallelCompile
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

X86 = platform.machine() in ("x86_64", "AMD64")
FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=off", "-fno-trapping-math", "-Wall",
         "-Wextra", "-Wno-psabi", "-Wno-maybe-uninitialized"]  # fmt: skip
VARIANT_FLAGS = {
    "_avx2.cpp": ["-mavx2", "-mf16c", "-mpopcnt", "-mbmi"],
    "_avx512.cpp": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mf16c", "-mpopcnt", "-mbmi",
                    "-mprefer-vector-width=512"],
}  # fmt: skip


def sources():
    found = sorted(glob("csrc/*.cpp") + glob("csrc/*/*.cpp"))
    return found if X86 else [s for s in found if not s.endswith(tuple(VARIANT_FLAGS))]


class BuildNative(build_ext):
    def build_extensions(self):
        compile_one = self.compiler._compile

        def with_variant_flags(obj, src, ext, cc_args, extra, pp_opts):
            extra = extra + next((flags for end, flags in VARIANT_FLAGS.items() if src.endswith(end)), [])
            compile_one(obj, src, ext, cc_args, extra, pp_opts)

        self.compiler._compile = with_variant_flags
        super().build_extensions()

    def run(self):
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
setup(ext_modules=[native], cmdclass={"build_ext": BuildNative})
