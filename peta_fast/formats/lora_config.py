"""adapter_config.json of a LoRA adapter: plain LoRA or refused by name, and every field that is read of its type."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from peta_fast.errors import CheckpointError, CompatibilityError
from peta_fast.formats.input_file import InputFile
from peta_fast.formats.peft_adapter import CONFIG, variants_of
from peta_fast.formats.strict_json import parse_json

Value = TypeVar("Value")


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json. Raises CheckpointError where there is none or a field is wrong, CompatibilityError for
    variants of LoRA."""
    file = folder / CONFIG
    if not file.is_file():
        raise CheckpointError(str(folder), f"expected a PEFT adapter, found no {CONFIG}", "Check the path.")
    config = read_object(file)
    kind = config.get("peft_type") or "LORA"
    unknown = [key for key, value in config.items() if key.startswith("use_") and key != "use_rslora" and value]
    variants = ([] if kind == "LORA" else [f"peft_type={kind!r}"]) + list(
        dict.fromkeys([*variants_of(config), *unknown])
    )
    if config.get("ensure_weight_tying"):
        variants.append("ensure_weight_tying")
    if variants:
        raise CompatibilityError(
            str(file),
            f"expected plain LoRA, got {', '.join(variants)}",
            "Its change of the weights is not scaling B A; convert it to plain LoRA first (PEFT's merge_and_unload, "
            "then `peta-fast adapter extract`).",
        )
    check_fields(config, str(file))
    return config


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a config's file. Raises CheckpointError."""
    with InputFile(file) as source:
        config = parse_json(source.read(0, source.size), str(file), "the configuration", infinities=True)
    if not isinstance(config, dict):
        raise CheckpointError(str(file), f"expected a JSON object, got {type(config).__name__}")
    return config


def check_fields(config: Mapping[str, Any], who: str) -> None:
    """Raises CheckpointError that names all fields whose values cannot be what PEFT means by them."""
    wrong = [
        f"{name} is {config[name]!r}, expected {expected}"
        for name, (fits, expected) in FIELDS.items()
        if config.get(name) is not None and not fits(config[name])
    ]
    if wrong:
        raise CheckpointError(who, "; ".join(wrong), "Save the adapter again.")


def pattern_value(patterns: Mapping[str, Value] | None, name: str, default: Value) -> Value:
    """PEFT's rank_pattern and alpha_pattern: the first key that matches the end of the name, from a dot on, wins."""
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def _is_rank(value: Any) -> bool:
    return type(value) is int and 1 <= value < 1 << 31


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300 and math.isfinite(value)


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _patterns(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    def check(patterns: Any) -> bool:
        return isinstance(patterns, dict) and all(map(_is_pattern, patterns)) and all(map(fits, patterns.values()))

    return check


def _is_pattern(text: str) -> bool:
    try:
        re.compile(rf"(.*\.)?({text})$")
    except re.error:
        return False
    return True


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_is_rank, "an integer of at least 1"),
    "lora_alpha": (_is_number, "a finite number"),
    "rank_pattern": (_patterns(_is_rank), "an object of regular expressions and integers of at least 1"),
    "alpha_pattern": (_patterns(_is_number), "an object of regular expressions and finite numbers"),
    "use_rslora": (_is_bool, "true or false"),
    "fan_in_fan_out": (_is_bool, "true or false"),
    "base_model_name_or_path": (_is_text, "text"),
    "bias": (_is_text, "text"),
    "task_type": (_is_text, "text"),
    "modules_to_save": (_is_names, "a list of names"),
    "target_modules": (lambda value: _is_text(value) or _is_names(value), "text or a list of names"),
}
"""Field -> (whether a value is one of its own, what is expected); null stands for the default everywhere."""
