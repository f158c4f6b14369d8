"""Functions of the user's own, named on the command line as MODULE:FUNCTION."""

from __future__ import annotations

from collections.abc import Callable


def function_at(text: str, option: str) -> Callable:
    """The function; modules of the current folder are found too. Raises UsageError when it is not there."""
    import importlib
    import os
    import sys

    from peta_fast.cli._errors import UsageError

    module, _, name = text.partition(":")
    if not module or not name:
        raise UsageError(f"--{option}", f"expected MODULE:FUNCTION, got {text!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"--{option}", f"cannot import {module!r}: {error}", "Run it where the module lies."
        ) from error
    if not callable(found):
        raise UsageError(f"--{option}", f"{module!r} has no function {name!r}")
    return found
