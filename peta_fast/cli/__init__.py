"""The command line. The folder is the registry: `x.py` holds the command `x`, a subfolder a group of commands.

Only the file of the command that is asked for is imported: `peta-fast merge` starts without the other commands' needs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

PROGRAM = "peta-fast"
FOLDER = os.path.dirname(__file__)
EPILOG = "--debug or PETA_FAST_DEBUG=1 shows the traceback of an error."


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code.

    0 done, 1 verify or diff found a difference, 2 usage or RecipeError, 3 CheckpointError, 4 CompatibilityError,
    5 ResourceError, 70 a defect of peta_fast, 130 interrupted, 141 nobody reads the output any more.
    """
    from peta_fast.cli._errors import guarded

    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words or os.environ.get("PETA_FAST_DEBUG", "") not in ("", "0")
    words = [word for word in words if word != "--debug"]
    return guarded(lambda: _dispatch(words), words, debug)


def _dispatch(words: list[str]) -> int | None:
    if words[:1] == ["--version"]:
        return _print_version()
    path, rest = split_command(words)
    if is_group(path):
        from peta_fast.cli._help import print_help, refuse

        asked = not rest or rest[0] in ("--help", "-h")
        return print_help(path) if asked else refuse(path, rest[0])
    from peta_fast.cli._parser import parse

    module = module_of(path)
    function = function_of(module)
    epilog = "\n\n".join(filter(None, [getattr(module, "EPILOG", ""), EPILOG]))
    return function(**parse(function, " ".join([PROGRAM, *path]), rest, epilog))


def split_command(words: list[str]) -> tuple[list[str], list[str]]:
    """(the leading words that name a group or a command, the others)."""
    length = 0
    while length < len(words) and is_group(words[:length]) and words[length] in commands(words[:length]):
        length += 1
    return words[:length], words[length:]


def commands(path: Sequence[str]) -> list[str]:
    """Names of the commands and groups in a group."""
    folder = _place(path)
    found = []
    for entry in os.listdir(folder):
        stem, suffix = os.path.splitext(entry)
        is_package = os.path.isfile(os.path.join(folder, entry, "__init__.py"))
        if not entry.startswith("_") and (suffix == ".py" or is_package):
            found.append(stem.replace("_", "-"))
    return sorted(found)


def is_group(path: Sequence[str]) -> bool:
    return os.path.isdir(_place(path))


def module_of(path: Sequence[str]) -> ModuleType:
    """The module of a command or group."""
    import importlib

    return importlib.import_module(".".join([__name__, *map(_as_identifier, path)]))


def function_of(module: ModuleType) -> Callable[..., int | None]:
    """The function that bears the name of its file."""
    return getattr(module, module.__name__.rpartition(".")[2])


def _place(path: Sequence[str]) -> str:
    return os.path.join(FOLDER, *map(_as_identifier, path))


def _as_identifier(word: str) -> str:
    return word.replace("-", "_")


def _print_version() -> int:
    from peta_fast import __version__

    print(f"{PROGRAM} {__version__}")
    return 0
