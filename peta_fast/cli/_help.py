"""What a group prints for --help and for a word that is no command of it."""

from __future__ import annotations

import inspect
from typing import NoReturn

from peta_fast.cli import EPILOG, PROGRAM, commands, function_of, module_of
from peta_fast.cli._errors import UsageError

SUMMARY = "Merge models at the cost of reading them and writing the result."
EXIT_CODES = """Exit codes: 0 done, 1 verify or diff found a difference, 2 usage or recipe, 3 checkpoint,
4 models that do not fit together, 5 disk or memory, 130 interrupted and resumable."""


def print_help(path: list[str]) -> int:
    """The commands of a group ([] is all), each with the first sentence of its help."""
    program = " ".join([PROGRAM, *path])
    names = commands(path)
    width = max(map(len, names))
    print(f"usage: {program} COMMAND ...\n\n{_summary(path)}\n\ncommands:")
    for name in names:
        print(f"  {name.ljust(width)}  {_summary([*path, name])}")
    print(f"\n`{program} COMMAND --help` shows its options.\n{EXIT_CODES}\n{EPILOG}")
    return 0


def _summary(path: list[str]) -> str:
    if not path:
        return SUMMARY
    module = module_of(path)
    text = module.__doc__ if hasattr(module, "__path__") else inspect.getdoc(function_of(module))
    return (text or "").partition("\n")[0].partition(". ")[0].rstrip(".") + "."


def refuse(path: list[str], word: str) -> NoReturn:
    """Raises UsageError for a word that names no command."""
    from difflib import get_close_matches

    known = commands(path)
    near = get_close_matches(word, known, 1)
    raise UsageError(
        word, f"expected a command ({', '.join(known)}), got {word!r}",
        f"Did you mean '{near[0]}'?" if near else f"Run `{' '.join([PROGRAM, *path])} --help`.",
    )  # fmt: skip
