"""Functions of the user's own, named on the command line as MODULE:FUNCTION or FILE.py:FUNCTION."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType


def function_at(text: str, option: str) -> Callable:
    """The function; modules of the current folder are found too. Raises UsageError when it is not there."""
    from difflib import get_close_matches

    from peta_fast.cli._errors import UsageError

    module_name, _, name = text.rpartition(":")
    if not module_name or not name:
        raise UsageError(f"--{option}", f"expected MODULE:FUNCTION or FILE.py:FUNCTION, got {text!r}")
    try:
        module = _module(module_name)
    except (ImportError, OSError, SyntaxError) as error:
        raise UsageError(
            f"--{option}", f"cannot import {module_name!r}: {error}", "Run it where the module lies."
        ) from error
    found = getattr(module, name, None)
    if not callable(found):
        near = get_close_matches(name, [n for n in vars(module) if callable(getattr(module, n))], 1)
        next_step = f"Did you mean {near[0]}?" if near else ""
        raise UsageError(f"--{option}", f"{module_name!r} has no function {name!r}", next_step)
    return found


def _module(name: str) -> ModuleType:
    """A module by its name, or by its file, which then finds its neighbours, too."""
    import importlib
    import os
    import sys
    from importlib.util import module_from_spec, spec_from_file_location

    if not name.endswith(".py"):
        _find_in(os.getcwd())
        return importlib.import_module(name)
    file, stem = os.path.abspath(name), os.path.splitext(os.path.basename(name))[0]
    _find_in(os.path.dirname(file))
    loaded = sys.modules.get(stem)
    if getattr(loaded, "__file__", None) == file:
        return loaded
    spec = spec_from_file_location(stem, file)
    module = sys.modules[stem] = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[stem]
        raise
    return module


def _find_in(folder: str) -> None:
    import sys

    if folder not in sys.path:
        sys.path.insert(0, folder)
