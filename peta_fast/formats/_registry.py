"""The weight formats: every module of this folder that has `matches` and `read_tensors`."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from pathlib import Path
from types import ModuleType

from peta_fast.errors import CheckpointError
from peta_fast.formats.tensor_index import FileIndex


@functools.cache
def formats() -> tuple[ModuleType, ...]:
    """The format modules, by name."""
    folder = str(Path(__file__).parent)
    names = sorted(module.name for module in pkgutil.iter_modules([folder]))
    modules = [importlib.import_module(f"peta_fast.formats.{name}") for name in names]
    return tuple(module for module in modules if hasattr(module, "matches") and hasattr(module, "read_tensors"))


def is_weight_file(path: Path) -> bool:
    """By its name alone."""
    return any(module.matches(path) for module in formats())


def read_tensors(file: Path) -> FileIndex:
    """Index of a weight file of any format. Raises CheckpointError when it is damaged or of none."""
    for module in formats():
        if module.matches(file):
            return module.read_tensors(file)
    known = ", ".join(module.__name__.rpartition(".")[2] for module in formats())
    raise CheckpointError(str(file), f"expected a weight file ({known}), got the suffix {file.suffix!r}")
