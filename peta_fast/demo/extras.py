"""Imports of the packages that only the demonstration needs."""

from __future__ import annotations

import importlib
from types import ModuleType

from peta_fast.errors import PetaFastError


def import_extra(module: str) -> ModuleType:
    """The module, e.g. "matplotlib.figure". Raises PetaFastError with the install command when it is not there."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        problem = f"expected the package {(error.name or module).partition('.')[0]!r}, got none: it is not installed"
        raise PetaFastError("peta-fast demo", problem, "pip install 'peta_fast[demo]'") from error
