"""`peta-fast build-cuda`: the CUDA library, for those who install first and find nvcc later."""

from __future__ import annotations

from typing import Annotated

from peta_fast.cli._options import AsJson
from peta_fast.cli._parser import Option

__all__ = ["build_cuda"]


def build_cuda(
    archs: Annotated[
        str,
        Option("--archs", help="Compute capabilities, such as 80,90, or all; those of the GPUs here when left out."),
    ] = "",
    force: Annotated[bool, Option("--force", help="Build even where a library is there already.")] = False,
    as_json: AsJson = False,
) -> int:
    """Build the CUDA library into your cache folder. Needs nvcc, and neither torch's headers nor the network."""
    from time import perf_counter

    from peta_fast import _cuda, _cuda_build
    from peta_fast.cli._errors import UsageError
    from peta_fast.cli._text import print_json, seconds_text
    from peta_fast.errors import ResourceError

    began = perf_counter()
    try:
        named = None if archs in ("", "all") else archs
        chosen = _cuda_build.wanted_architectures("on" if archs == "all" else "auto", named)
        if not chosen:
            raise UsageError("--archs", "expected compute capabilities, since no GPU is here to ask",
                             "Say --archs 90, or --archs all.")  # fmt: skip
        csrc = _cuda.source_folder()
        if csrc is None:
            raise ResourceError(
                "csrc", "expected the CUDA sources beside the package, found none", "Reinstall peta_fast."
            )
        target = _cuda.cache_folder() / f"sm_{'_'.join(chosen)}" / _cuda_build.NAME
        fresh = force or not target.exists()
        if fresh:
            _cuda_build.build(csrc, target, chosen)
    except _cuda_build.BuildError as error:
        raise ResourceError("build-cuda", str(error)) from error
    seconds = perf_counter() - began
    found = {"library": str(target), "architectures": chosen, "built": fresh, "seconds": round(seconds, 1)}
    if as_json:
        print_json(found)
    else:
        print(f"{target}: {f'built in {seconds_text(seconds)}' if fresh else 'is there already'}")
    return 0
