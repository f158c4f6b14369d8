"""One setting of a recipe: a value, a gradient over the layers, or a list of values with filters.

    0.5                                     one value for all tensors
    [0, 0.5, 1]                             numbers: interpolated at t = index / (layers - 1)
    [first, last]                           anything else: the member int(t * (length - 1))
    [{filter: mlp, value: ...}, {value: ...}]   the first whose filter is part of the tensor's name

Source: the semantics of mergekit's recipes, as observed by running version 0.1.5.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from peta_fast._yaml_lines import Faults, Located, closest, listed, nearest, shown
from peta_fast.methods import Key


@dataclass(frozen=True, slots=True)
class Condition:
    """One value of a setting, and the tensors it holds for.

    filter  part of the names of those tensors; "" is part of all names
    values  one, or several along the layers
    kind    type of the values; float and int are interpolated
    """

    filter: str
    values: tuple
    kind: type

    def at(self, t: float) -> Any:
        """The value at position t, from 0 (first layer) to 1 (last)."""
        last = len(self.values) - 1
        place = t * last
        index = min(int(place), last)
        if index == last or self.kind not in (float, int):
            return self.values[index]
        fraction = place - index
        return self.kind((1 - fraction) * self.values[index] + fraction * self.values[index + 1])


Setting = tuple[Condition, ...]


def always(value: Any, kind: type = object) -> Setting:
    """The setting with one value for all tensors."""
    return (Condition("", (value,), kind),)


def read_setting(node: Located, key: Key, faults: Faults) -> Setting:
    """The setting that a node spells. What is wrong with it goes to faults, and then it is not to be evaluated."""
    if _is_conditional(node):
        members = node.value if isinstance(node.value, list) else [node]
        return tuple(_read_condition(member, key, faults) for member in members)
    return (Condition("", _read_values(node, key, faults), key.kind),)


def _is_conditional(node: Located) -> bool:
    if isinstance(node.value, list):
        return any(isinstance(member.value, dict) for member in node.value)
    return isinstance(node.value, dict)


def _read_condition(node: Located, key: Key, faults: Faults) -> Condition:
    if not isinstance(node.value, dict):
        faults.add(node, f"'{key.name}' mixes plain values and filters; give {shown(node.value)} as '- value: ...'")
        return Condition("", (), key.kind)
    for name, member in node.value.items():
        if name not in ("filter", "value"):
            faults.add(member, f"{shown(name)} is not a key of a filtered value{nearest(name, ('filter', 'value'))}")
    values: tuple = ()
    if "value" in node.value:
        values = _read_values(node.value["value"], key, faults)
    else:
        faults.add(node, f"this entry of '{key.name}' has no 'value'")
    return Condition(_read_filter(node.value.get("filter"), faults), values, key.kind)


def _read_filter(node: Located | None, faults: Faults) -> str:
    if node is None or node.value in (None, "*"):
        return ""
    if not isinstance(node.value, str):
        faults.add(node, f"'filter' is {shown(node.value)}, expected text that is part of tensor names")
        return ""
    return node.value


def _read_values(node: Located, key: Key, faults: Faults) -> tuple:
    members = node.value if isinstance(node.value, list) else [node]
    if not members:
        faults.add(node, f"'{key.name}' is an empty list, expected {expected(key)} or a list of them")
    return tuple(_read_value(member, key, faults) for member in members)


def _read_value(node: Located, key: Key, faults: Faults) -> Any:
    value = node.value
    if key.kind is bool and not isinstance(value, str) and value in (0, 1):
        return bool(value)
    if not _is_valid(value, key):
        faults.add(node, f"'{key.name}' is {shown(value)}, expected {expected(key)}{_hint(value, key)}")
        return None
    return key.kind(value) if key.kind in (float, int) else value


def _is_valid(value: Any, key: Key) -> bool:
    if value is None or isinstance(value, dict | list):
        return False
    if key.kind in (float, int):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return False
        return _in_range(value, key) and (key.kind is float or value == int(value))
    if key.choices:
        return value in key.choices
    if key.kind is str:
        return isinstance(value, str) and value != ""
    return key.kind is not bool


def _hint(value: Any, key: Key) -> str:
    if not isinstance(value, str):
        return ""
    if key.choices:
        return closest(value, key.choices)
    quoted = key.kind in (float, int) and _spells_number(value) or key.kind is bool and value in ("true", "false")
    return "; remove the quotes" if quoted else ""


def _spells_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _in_range(value: float, key: Key) -> bool:
    return (key.low is None or value >= key.low) and (key.high is None or value <= key.high)


def expected(key: Key) -> str:
    """What a key takes, as the end of "expected ..."."""
    if key.choices:
        return listed(key.choices, "or")
    if key.kind not in (float, int):
        return {bool: "true or false", str: "text"}.get(key.kind, "a value")
    noun = "an integer" if key.kind is int else "a finite number"
    if key.low is not None and key.high is not None:
        return f"{noun} from {key.low:g} to {key.high:g}"
    if key.low is not None:
        return f"{noun} of at least {key.low:g}"
    return f"{noun} of at most {key.high:g}" if key.high is not None else noun


def setting_schema(key: Key) -> dict:
    """JSON schema of the settings that read_setting accepts for a key."""
    value = _value_schema(key)
    values = {"anyOf": [value, {"type": "array", "items": value, "minItems": 1}]}
    condition = {
        "type": "object",
        "properties": {"filter": {"type": ["string", "null"]}, "value": values},
        "required": ["value"],
        "additionalProperties": False,
    }
    schema: dict = {"anyOf": [*values["anyOf"], condition, {"type": "array", "items": condition, "minItems": 1}]}
    if key.help:
        schema["description"] = key.help
    if not key.required and key.default is not None:
        schema["default"] = key.default
    return schema


def _value_schema(key: Key) -> dict:
    if key.choices:
        return {"enum": list(key.choices)}
    if key.kind is bool:
        return {"enum": [True, False, 0, 1]}
    if key.kind not in (float, int):
        return {"type": "string", "minLength": 1} if key.kind is str else {"type": ["string", "number", "boolean"]}
    limits = {"minimum": key.low, "maximum": key.high}
    kind = "integer" if key.kind is int else "number"
    return {"type": kind, **{name: limit for name, limit in limits.items() if limit is not None}}
