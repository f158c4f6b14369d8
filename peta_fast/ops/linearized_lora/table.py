"""Tables of what was measured on GPUs: one in this package, one of the user's, which comes first.

    {"format": "peta_fast tuning 1", "entries": {KEY: {"blocks": {...}, ...}}}

Keys and blocks: see blocks.py; what else stands in an entry says how it was measured. The user's file is the one that
PETA_FAST_TUNING names, else peta_fast/tuning.json in the user's cache folder; tuning.py writes it. A file that is not
sound is left out with one warning.
"""

from __future__ import annotations

import functools
import json
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FORMAT = "peta_fast tuning 1"
SHIPPED = Path(__file__).with_name("measured.json")
SIDES = {
    "fused": ("BM", "BN", "BK", "GROUP"),
    "prefill": ("BM", "BN", "BK"),
    "partials": ("BM", "BN"),
    "finish": ("BM", "BN", "BK"),
    "dA": ("BM", "BK"),
    "crossover": (),
}
"""What an entry of each kind must hold, beside num_warps and num_stages; a crossover holds rows alone."""
KEY = re.compile(
    r"(sm_\d+|interpreter)/(?P<kind>[a-zA-Z]+)(_general)?(_dual)?/(?P<rows>M\d+-)?K\d+-N\d+-R\d+", re.ASCII
)


def user_file() -> Path:
    named = os.environ.get("PETA_FAST_TUNING")
    if named:
        return Path(named).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "peta_fast" / "tuning.json"


def lookup(key: str) -> dict[str, int] | None:
    """The blocks that were measured best, or None."""
    return _all().get(key)


@functools.cache
def _all() -> dict[str, dict[str, int]]:
    entries = {**entries_of(SHIPPED), **entries_of(user_file())}
    return {key: entry["blocks"] for key, entry in entries.items()}


def forget() -> None:
    _all.cache_clear()


def entries_of(file: Path) -> dict[str, dict[str, Any]]:
    """Of a sound file; of one that is missing or not sound none, in the latter case with a warning that names it."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        return _ignored(file, str(error))
    problem = fault_of(found)
    return _ignored(file, problem) if problem else found["entries"]


def _ignored(file: Path, problem: str) -> dict[str, dict[str, Any]]:
    text = f"{file}: left out, since it is no table of measured block shapes: {problem}. Delete it, or run pf.tune()."
    warnings.warn(text, RuntimeWarning, stacklevel=2)
    return {}


def fault_of(found: Any) -> str:
    """What is wrong with a file's content, "" for nothing."""
    if not isinstance(found, Mapping) or found.get("format") != FORMAT or not isinstance(found.get("entries"), Mapping):
        return f"expected an object with format {FORMAT!r} and entries"
    return next((f"{key!r}: {fault}" for key, entry in found["entries"].items() if (fault := _fault(key, entry))), "")


def _fault(key: str, entry: Any) -> str:
    parts = KEY.fullmatch(key)
    if parts is None or parts["kind"] not in SIDES or (parts["kind"] == "crossover") == bool(parts["rows"]):
        return "expected sm_90/KERNEL/M64-K4096-N4096-R16"
    blocks = entry.get("blocks") if isinstance(entry, Mapping) else None
    crossover = parts["kind"] == "crossover"
    names = ("rows",) if crossover else (*SIDES[parts["kind"]], "num_warps", "num_stages")
    if not isinstance(blocks, Mapping) or sorted(blocks) != sorted(names):
        return f"expected blocks with {', '.join(names)}"
    bad = [name for name, value in blocks.items() if not _may_be(name, value)]
    return f"{bad[0]} is {blocks[bad[0]]!r}" if bad else ""


def _may_be(name: str, value: Any) -> bool:
    if type(value) is not int:
        return False
    least, most = {"rows": (0, 1 << 20), "GROUP": (1, 64), "num_warps": (1, 16), "num_stages": (1, 8)}.get(
        name, (16, 512)
    )
    return least <= value <= most and (name in ("rows", "num_stages", "GROUP") or value & (value - 1) == 0)


def write(file: Path, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Adds the entries to the file; it is replaced whole or not at all. A file that is not sound is replaced too."""
    content = {"format": FORMAT, "entries": dict(sorted({**entries_of(file), **entries}.items()))}
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        with open(partial, "w", encoding="utf-8") as stream:
            json.dump(content, stream, indent=1)
            stream.write("\n")
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
    forget()
