"""Loads the native CPU module and says what is there. PETA_FAST_NATIVE=auto|require|off decides whether to."""

from __future__ import annotations

import functools
import os
from types import ModuleType

from peta_fast.errors import PetaFastError


@functools.cache
def native() -> ModuleType | None:
    """The native module, or None where it is not built or PETA_FAST_NATIVE=off.

    Raises PetaFastError when PETA_FAST_NATIVE=require and it cannot be loaded, or when a variable has no such value.
    """
    mode = os.environ.get("PETA_FAST_NATIVE", "auto")
    if mode not in ("auto", "require", "off"):
        raise PetaFastError("PETA_FAST_NATIVE", f"expected auto, require or off, got {mode!r}")
    if mode == "off":
        return None
    try:
        from peta_fast import _cpu
    except ImportError as error:
        if mode == "require":
            raise PetaFastError(
                "peta_fast._cpu", f"expected the native module, got {error}", "Install g++ and reinstall peta_fast."
            ) from error
        return None
    _choose_simd(_cpu)
    return _cpu


def _choose_simd(module: ModuleType) -> None:
    wanted = os.environ.get("PETA_FAST_SIMD", "")
    if not module.set_simd(wanted):
        raise PetaFastError(
            "PETA_FAST_SIMD", f"expected one this CPU has, up to {module.best_simd()!r}, got {wanted!r}"
        )


def describe() -> dict[str, str]:
    """What runs the operations and why, for `peta-fast doctor`."""
    mode = os.environ.get("PETA_FAST_NATIVE", "auto")
    module = native()
    if module is None:
        reason = "PETA_FAST_NATIVE=off" if mode == "off" else "the module peta_fast._cpu is not built"
        return {"operations": "plain PyTorch", "reason": reason}
    return {
        "operations": "native",
        "simd": module.simd(),
        "best simd": module.best_simd(),
        "threads": str(module.default_threads()),
    }
