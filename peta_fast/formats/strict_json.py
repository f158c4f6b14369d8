"""JSON out of files that nobody vouches for: one meaning or a CheckpointError."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from peta_fast.errors import CheckpointError
from peta_fast.formats.tensor_index import brief


def parse_json(text: bytes, who: str, what: str, *, infinities: bool = False) -> Any:
    """The value that the text holds.

    what        what the text is, for the error: "the header"
    infinities  take NaN and Infinity, which are no JSON but stand in some models' config.json

    Raises CheckpointError when it is not UTF-8, no JSON, nested too deep, or names a key twice in one object.
    """
    constant = float if infinities else _refuse_constant
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_object, parse_constant=constant)
    except RecursionError:
        raise CheckpointError(who, f"{what} is nested too deep for JSON of a checkpoint") from None
    except UnicodeDecodeError as error:
        raise CheckpointError(who, f"{what} is not UTF-8: {error.reason} at byte {error.start}") from None
    except ValueError as error:
        raise CheckpointError(who, f"{what} is not valid JSON: {error}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        key, times = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {brief(key)} stands {times} times in one object")
    return members


def _refuse_constant(name: str):
    raise ValueError(f"{name} is no number")
