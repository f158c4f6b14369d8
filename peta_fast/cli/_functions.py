"""Functions of the user's own, named on the command line as module:function or file.py:function."""

from __future__ import annotations

import functools
import os
import sys
import traceback
from collections.abc import Callable
from types import ModuleType
from typing import Any

from peta_fast.cli._errors import UsageError


def function_at(option: str, spelled: str) -> Callable:
    """The function; modules of the current folder are found too. Raises UsageError when it is not there."""
    module_name, colon, name = spelled.rpartition(":")
    if not colon or not module_name or not name:
        raise UsageError(option, f"expected module:function, got {spelled!r}")
    module = _imported(option, module_name)
    function = getattr(module, name, None)
    if not callable(function):
        from difflib import get_close_matches

        near = get_close_matches(name, [n for n in vars(module) if callable(getattr(module, n))], 1)
        raise UsageError(option, f"{module_name} has no function {name!r}", f"Did you mean {near[0]}?" if near else "")
    return function


def reporting(option: str, spelled: str, function: Callable) -> Callable:
    """The function; what it raises becomes a UsageError that says where."""

    @functools.wraps(function)
    def called(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except Exception as error:
            raise _raised(option, spelled, error) from error

    return called


def _imported(option: str, module_name: str) -> ModuleType:
    try:
        return _module(module_name)
    except (ImportError, OSError, SyntaxError) as error:
        raise UsageError(
            option, f"{module_name} cannot be imported: {error}", "Run it where the module lies."
        ) from error
    except (Exception, SystemExit) as error:
        raise _raised(option, module_name, error) from error


def _module(name: str) -> ModuleType:
    """A module by its name, or by its file, which then finds its neighbours, too."""
    import importlib
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
    if folder not in sys.path:
        sys.path.insert(0, folder)


def _raised(option: str, who: str, error: BaseException) -> UsageError:
    frames = traceback.extract_tb(error.__traceback__)
    where = f" in {frames[-1].filename}, line {frames[-1].lineno}" if frames else ""
    said = f": {error}" if str(error) else ""
    return UsageError(option, f"{who} raised {type(error).__name__}{said}{where}", "--debug shows the traceback.")
