"""YAML text, or a Python mapping, as one tree in which every value knows where it stands.

Faults are gathered, not raised, so that a reader can report all of them at once, in the order of their lines.
Duplicate keys are faults; anchors, aliases and merge keys (`<<`) work; tags that would build Python objects do not.
A document that is too big, too deep or refers to itself is refused before it can exhaust the machine.
"""

from __future__ import annotations

import numbers
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from peta_fast.errors import RecipeError

MAX_BYTES = 8 << 20
MAX_NODES = 200_000
MAX_DEPTH = 50
MAX_FAULTS = 200
MAX_INTEGER = 1 << 64
MAX_DIGITS = 400  # base-60 integers (1:30:00) take quadratic time

_TAG = "tag:yaml.org,2002:"
_TEXT_TAGS = {_TAG + kind for kind in ("str", "value", "merge", "timestamp")}
# `1e-5` is a number to its author and to YAML 1.2; YAML 1.1 takes an exponent only after a point and with a sign.
_PLAIN_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+")


@dataclass(frozen=True, slots=True)
class Located:
    """A value of a recipe and the place it stands at.

    value  dict of str to Located, list of Located, or str, int, float, bool, None
    where  "recipe.yml:7", or "models[0].parameters.density" in a Python mapping
    line   the key's line, counted from 1; a list member's own line; 0 in a Python mapping
    """

    value: Any
    where: str
    line: int = 0


class Faults:
    """Collects what is wrong with a recipe, to be raised as one RecipeError."""

    def __init__(self) -> None:
        self._found: list[tuple[int, str, str]] = []

    def add(self, at: Located, problem: str) -> None:
        self._found.append((at.line, at.where, problem))
        if len(self._found) == MAX_FAULTS:
            self.abort(at, f"is where reading stopped, after {MAX_FAULTS} faults")

    def raise_all(self) -> None:
        """Raises RecipeError with every fault on a line of its own; does nothing when there is none."""
        if self._found:
            raise self._error()

    def abort(self, at: Located, problem: str) -> NoReturn:
        """Raises at once: nothing that follows could be read."""
        self._found.append((at.line, at.where, problem))
        raise self._error()

    def _error(self) -> RecipeError:
        ordered = sorted(dict.fromkeys(self._found), key=lambda fault: fault[0])
        first, *others = [(where, problem) for _, where, problem in ordered]
        return RecipeError(first[0], "\n".join([first[1], *(f"{where}: {problem}" for where, problem in others)]))


def shown(value: Any) -> str:
    """A value as an error message quotes it: short, with true, false and null as YAML spells them."""
    if value is None or isinstance(value, bool):
        return {None: "nothing", True: "true", False: "false"}[value]
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if not isinstance(value, str | int | float):
        return f"a {type(value).__name__}"
    text = repr(value)
    return text if len(text) <= 60 else text[:56] + "..." + text[-1]


def listed(names: Iterable[str], last: str = "and") -> str:
    """'a', 'a and b', 'a, b and c'."""
    *head, tail = names
    return f"{', '.join(head)} {last} {tail}" if head else tail


def close_name(word: str, names: Iterable[str]) -> str | None:
    """The valid name that is close to an unknown word, if there is one."""
    from difflib import get_close_matches  # only a faulty recipe pays for the import

    return next(iter(get_close_matches(word[:60].lower(), list(names), n=1)), None)


def closest(word: str, names: Iterable[str]) -> str:
    """The end of a sentence about an unknown word: the valid name that is close to it, or nothing."""
    close = close_name(word, names)
    return f"; did you mean '{close}'?" if close else ""


def nearest(word: str, names: Sequence[str]) -> str:
    """As `closest`; where no valid name is close, all of them."""
    return closest(word, names) or (f"; expected {listed(names, 'or')}" if names else "")


def locate_mapping(mapping: Mapping, faults: Faults) -> Located:
    """The tree of a Python mapping; keys must be str, numpy scalars and paths become plain values."""
    return _MappingReader(faults).locate(mapping, "", 0)


def locate_documents(text: str, source: str, faults: Faults) -> list[tuple[Located, str]]:
    """The tree and the text of each document of a YAML stream.

    source  name that faults carry before the line
    Raises RecipeError at once when the text is no YAML, too large, or nested too deep.
    """
    import yaml  # 40 ms that keywords and mappings need not wait for

    if len(text) > MAX_BYTES:
        faults.abort(Located(None, source), f"is larger than {MAX_BYTES >> 20} MB; a recipe is a short YAML text")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        _refuse_bombs(yaml.parse(text, loader), source, faults)
        nodes = list(yaml.compose_all(text, loader))
    except yaml.YAMLError as error:
        faults.abort(_place_of(error, text, source), f"is not valid YAML: {_first_line(error)}")
    except UnicodeEncodeError as error:
        at = text.count("\n", 0, error.start) + 1
        faults.abort(Located(None, f"{source}:{at}", at), "holds a lone surrogate, which is not text")
    reader = _NodeReader(source, faults)
    lines = text.splitlines(keepends=True)
    return [(reader.locate(node, node.start_mark.line + 1, 0), _text_of(node, lines)) for node in nodes]


def _refuse_bombs(events: Iterable, source: str, faults: Faults) -> None:
    """Composing keeps every node and recurses in C, where no recursion limit holds; events come one after another."""
    budget, depth = _Budget(faults), 0
    for event in events:
        name = type(event).__name__
        depth += name.endswith("StartEvent") - name.endswith("EndEvent")
        line = event.start_mark.line + 1
        budget.spend(Located(None, f"{source}:{line}", line), depth)


def _place_of(error: Any, text: str, source: str) -> Located:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    line = mark.line if mark else text.encode()[: getattr(error, "position", 0)].count(b"\n")
    return Located(None, f"{source}:{line + 1}", line + 1)


def _first_line(error: Any) -> str:
    return getattr(error, "problem", None) or getattr(error, "reason", None) or str(error).partition("\n")[0]


def _text_of(node: Any, lines: Sequence[str]) -> str:
    first, last = node.start_mark.line, node.end_mark.line + (node.end_mark.column > 0)
    return "".join(lines[first:last])


class _Budget:
    """Counts the values of a tree, each use of an alias anew: a few lines of YAML can stand for 10^9 of them."""

    def __init__(self, faults: Faults):
        self.faults, self.nodes = faults, 0

    def spend(self, at: Located, depth: int) -> None:
        self.nodes += 1
        if self.nodes > MAX_NODES:
            self.faults.abort(at, f"holds more than {MAX_NODES:,} values once its aliases are expanded")
        if depth > MAX_DEPTH:
            self.faults.abort(at, f"is nested more than {MAX_DEPTH} deep, or an alias holds itself")


class _NodeReader(_Budget):
    """Turns composed YAML nodes into Located values."""

    def __init__(self, source: str, faults: Faults):
        super().__init__(faults)
        from yaml.constructor import SafeConstructor

        self.source = source
        convert = SafeConstructor()
        self._scalars = {
            _TAG + "null": lambda node: None,
            _TAG + "bool": convert.construct_yaml_bool,
            _TAG + "int": convert.construct_yaml_int,
            _TAG + "float": convert.construct_yaml_float,
        }

    def locate(self, node: Any, line: int, depth: int) -> Located:
        at = Located(None, f"{self.source}:{line}", line)
        self.spend(at, depth)
        if node.id == "scalar":
            value = self._scalar(node, at)
        elif node.tag == _TAG + "seq" and node.id == "sequence":
            value = [self.locate(member, member.start_mark.line + 1, depth + 1) for member in node.value]
        elif node.tag == _TAG + "map" and node.id == "mapping":
            value = self._mapping(node, depth)
        else:
            self._refuse_tag(node, at)
            value = None
        return Located(value, at.where, line)

    def _mapping(self, node: Any, depth: int) -> dict[str, Located]:
        own: dict[str, Located] = {}
        merged: dict[str, Located] = {}
        for key, member in node.value:
            line = key.start_mark.line + 1
            value = self.locate(member, line, depth + 1)
            if key.tag == _TAG + "merge":
                self._merge(merged, value)
            elif key.id != "scalar" or key.tag not in _TEXT_TAGS:
                name = shown(key.value) if key.id == "scalar" else "a list or mapping"
                self.faults.add(value, f"{name} cannot be a key: YAML does not read it as text; put it in quotes")
            elif key.value in own:
                self.faults.add(
                    value, f"{shown(key.value)} is given twice; it stands in line {own[key.value].line} too"
                )
            else:
                own[key.value] = value
        return {**merged, **own}

    def _merge(self, merged: dict[str, Located], value: Located) -> None:
        """`<<: mapping` or `<<: [mapping, ...]`; the earlier mapping wins, own keys win over all."""
        for mapping in value.value if isinstance(value.value, list) else [value]:
            if isinstance(mapping.value, dict):
                merged.update((name, member) for name, member in mapping.value.items() if name not in merged)
            else:
                self.faults.add(value, f"'<<' takes a mapping or a list of mappings, got {shown(mapping.value)}")

    def _scalar(self, node: Any, at: Located) -> Any:
        if node.tag in _TEXT_TAGS:
            plain = node.style not in ("'", '"', "|", ">")
            return float(node.value) if plain and _PLAIN_NUMBER.fullmatch(node.value) else node.value
        if node.tag not in self._scalars:
            self._refuse_tag(node, at)
            return None
        try:
            if len(node.value) <= MAX_DIGITS:
                return _bounded(self._scalars[node.tag](node), at, self.faults)
        except (ValueError, LookupError, OverflowError):
            pass
        self.faults.add(at, f"{shown(node.value)} is no {node.tag.rpartition(':')[2]}")
        return None

    def _refuse_tag(self, node: Any, at: Located) -> None:
        self.faults.add(at, f"the YAML tag '{node.tag}' has no meaning in a recipe; remove it")


class _MappingReader(_Budget):
    """Turns Python objects into Located values."""

    def locate(self, value: Any, path: str, depth: int) -> Located:
        at = Located(None, path or "recipe")
        self.spend(at, depth)
        if isinstance(value, Mapping):
            return Located(self._mapping(value, path, depth), at.where)
        if isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray | memoryview):
            members = [self.locate(member, f"{path}[{i}]", depth + 1) for i, member in enumerate(value)]
            return Located(members, at.where)
        return Located(_bounded(_plain_scalar(value), at, self.faults), at.where)

    def _mapping(self, mapping: Mapping, path: str, depth: int) -> dict[str, Located]:
        members = {}
        for key, value in mapping.items():
            if isinstance(key, str):
                members[key] = self.locate(value, f"{path}.{key}" if path else key, depth + 1)
            else:
                at = Located(None, path or "recipe")
                self.faults.add(at, f"a key must be text, got a key of type {type(key).__name__}")
        return members


def _plain_scalar(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return value.item()
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    return value


def _bounded(value: Any, at: Located, faults: Faults) -> Any:
    if isinstance(value, int) and abs(value) >= MAX_INTEGER:
        faults.add(at, "an integer must be smaller than 2^64")
        return None
    return value
