"""Command files to parsers: a command's annotations are its options, its docstring is its help.

    def inspect(
        paths: Annotated[list[str], Argument("PATH", "model folders")],
        limit: Annotated[int, Option("--limit", help="rows to show", low=0)] = 40,
    ) -> int:
        '''Print what checkpoints hold.'''

Types are bool, int, float, str, Path, one of these or None, and lists of str. argparse does the work: typer 0.29
imports pydantic for every command, which takes longer than a small merge.
"""

from __future__ import annotations

import argparse
import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, NoReturn, Union, get_args, get_origin, get_type_hints

from peta_fast.cli._errors import UsageError

_FORMAT = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=34)


@dataclass(frozen=True)
class Argument:
    """A word by its place; a list takes one or more, with a default none or more."""

    metavar: str
    help: str


class Option:
    """--name VALUE, or for bool --name; "--name/--no-name" has both. low: least number. An empty help hides it.

    several: for lists, one --name takes all words up to the next option; metavar: what they are called
    """

    def __init__(
        self, *names: str, help: str = "", low: int | float | None = None, several: bool = False, metavar: str = "X"
    ):
        self.names, self.help, self.low, self.several, self.metavar = names, help, low, several, metavar


class Rest:
    """What stands after `--`, as a list."""


def parse(function: Callable, program: str, words: Sequence[str], epilog: str = "") -> dict[str, Any]:
    """The function's keyword arguments. Raises UsageError for words that do not fit, SystemExit(0) after --help."""
    parser = _Parser(
        program, description=inspect.getdoc(function), epilog=epilog, formatter_class=_FORMAT,
        allow_abbrev=False, add_help=False,
    )  # fmt: skip
    rest_name = _add_parameters(parser, function)
    parser.add_argument("--help", "-h", action="help", help="Show this and leave.")
    words, rest = _split(words)
    if rest and rest_name is None:
        parser.error(f"nothing may stand after '--', got {rest[0]!r}")
    found, unknown = parser.parse_known_intermixed_args(words)
    if unknown:
        parser.refuse(unknown[0])
    return vars(found) | ({rest_name: rest} if rest_name else {})


def _add_parameters(parser: _Parser, function: Callable) -> str | None:
    """Adds every parameter of the function but the one that takes the rest, whose name is returned."""
    rest_name, places = None, []
    hints = get_type_hints(function, include_extras=True)
    for name, parameter in inspect.signature(function).parameters.items():
        kind, mark = _declared(hints[name])
        if isinstance(mark, Rest):
            rest_name = name
            places.append("[-- ...]")
        elif isinstance(mark, Argument):
            _add_argument(parser, name, kind, mark, parameter.default)
            places.append(mark.metavar if parameter.default is inspect.Parameter.empty else f"[{mark.metavar}]")
        else:
            _add_option(parser, name, kind, mark, parameter.default)
    parser.usage = " ".join([parser.prog, "[OPTIONS]", *places])
    return rest_name


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    words = list(words)
    if "--" not in words:
        return words, []
    at = words.index("--")
    return words[:at], words[at + 1 :]


def _declared(hint: Any) -> tuple[Any, Argument | Option | Rest]:
    """(type, mark) of a parameter; the type of `X | None` is X."""
    hint = _without_none(hint)  # Python 3.10 puts None around what has that default
    if get_origin(hint) is not Annotated:
        raise TypeError(f"expected Annotated[type, Option(...)], got {hint}")
    kind, mark = get_args(hint)[:2]
    return _without_none(kind), mark


def _without_none(hint: Any) -> Any:
    if get_origin(hint) in (Union, UnionType):
        return next(member for member in get_args(hint) if member is not NoneType)
    return hint


def _add_argument(parser, name: str, kind: Any, mark: Argument, default: Any) -> None:
    required = default is inspect.Parameter.empty
    if get_origin(kind) is list:
        settings: dict[str, Any] = {"type": get_args(kind)[0], "nargs": "+" if required else "*"}
    else:
        settings = {"type": kind, "nargs": None if required else "?"}
    if not required:
        settings["default"] = default
    parser.add_argument(name, metavar=mark.metavar, help=mark.help, **settings)


def _add_option(parser, name: str, kind: Any, mark: Option, default: Any) -> None:
    shown = argparse.SUPPRESS if not mark.help else mark.help + _default_text(default)
    if kind is bool:
        on, off = zip(*(n.partition("/")[::2] for n in mark.names), strict=True)
        parser.add_argument(*on, dest=name, action="store_true", default=default, help=shown)
        if any(off):
            parser.add_argument(*filter(None, off), dest=name, action="store_false", help=argparse.SUPPRESS)
    elif get_origin(kind) is list:
        settings = {"action": "extend", "nargs": "+"} if mark.several else {"action": "append"}
        parser.add_argument(*mark.names, dest=name, default=default, help=shown, metavar=mark.metavar, **settings)
    else:
        metavar = "N" if kind in (int, float) else mark.names[0].rpartition("-")[2].upper()
        reader = _number(kind, mark.low) if kind in (int, float) else kind
        parser.add_argument(*mark.names, dest=name, type=reader, default=default, help=shown, metavar=metavar)


def _number(kind: type, low: int | float | None) -> Callable[[str], Any]:
    expected = "an integer" if kind is int else "a number"
    least = "" if low is None else f" from {low} on"

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or value != value or (low is not None and value < low):
            raise argparse.ArgumentTypeError(f"expected {expected}{least}, got {text!r}")
        return value

    return read


def _default_text(default: Any) -> str:
    return "" if default is None or default is False else f" [{default}]"


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are ours."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(self.prog, message, f"Run `{self.prog} --help`.")

    def refuse(self, word: str) -> NoReturn:
        """Raises UsageError for a word that no option or place takes, with the nearest option."""
        from difflib import get_close_matches

        if not word.startswith("-"):
            self.error(f"expected no more words, got {word!r}")
        known = [name for action in self._actions for name in action.option_strings]
        near = get_close_matches(word.partition("=")[0], known, 1)
        next_step = f"Did you mean {near[0]}?" if near else f"Run `{self.prog} --help`."
        raise UsageError(self.prog, f"has no option {word}", next_step)
