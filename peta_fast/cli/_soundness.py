"""The checks of `peta-fast verify`, in the order in which one makes the next possible."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from peta_fast.cli._checkpoints import open_model
from peta_fast.cli._statistics import nonfinite
from peta_fast.errors import CheckpointError
from peta_fast.formats import Checkpoint
from peta_fast.formats.disk import PARTIAL
from peta_fast.journal import JOURNAL
from peta_fast.journal import verify as verify_journal

SHOWN = 20
"""Problems of one check that are listed."""


@dataclass
class Check:
    """One check: sound when it has no problems. note: what was looked at, or why nothing was."""

    name: str
    problems: list[str] = field(default_factory=list)
    note: str = ""

    def lines(self) -> list[str]:
        if not self.problems:
            return [f"ok     {self.name}: {self.note}"]
        more = len(self.problems) - SHOWN
        listed = self.problems[:SHOWN] + ([f"... {more} more; --json shows them"] if more > 0 else [])
        return [f"FAULT  {self.name}: {problem}" for problem in listed]


def examined(path: str, allow_nonfinite: bool) -> list[Check]:
    """All checks that could be made. Raises CheckpointError when there is nothing at `path`."""
    checks = [_unfinished(Path(path))]
    try:
        checkpoint = open_model(path)
    except CheckpointError as error:
        if not Path(path).expanduser().exists():
            raise
        return [*checks, Check("headers", [str(error).replace("\n", " ")])]
    with checkpoint:
        checks.append(Check("headers", note=f"{len(checkpoint.tensors)} tensors, {len(checkpoint.files)} files"))
        checks.append(_checksums(checkpoint))
        checks.append(Check("values", note="not looked at") if allow_nonfinite else _values(checkpoint))
        checks.append(_loading(checkpoint))
    return checks


def _unfinished(path: Path) -> Check:
    names = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
    left = [f"{name} is left of an unfinished merge" for name in names if name.endswith(PARTIAL)]
    return Check("finished", left, "nothing is left half written")


def _checksums(checkpoint: Checkpoint) -> Check:
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    if not (folder / JOURNAL).exists():
        return Check("checksums", note=f"none known, there is no {JOURNAL}")
    try:
        return Check("checksums", verify_journal(folder), "as the journal has them")
    except CheckpointError as error:
        return Check("checksums", [str(error).replace("\n", " ")])


def _values(checkpoint: Checkpoint) -> Check:
    problems = []
    for name in checkpoint.tensors:
        count = nonfinite(checkpoint.buffer(name))
        if count:
            problems.append(f"{name!r} holds {count} values that are NaN or infinite")
    return Check("values", problems, "all finite")


def _loading(checkpoint: Checkpoint) -> Check:
    """Each safetensors file opened by the library of that name, which must find the same tensors."""
    from safetensors import SafetensorError, safe_open

    files = [file for file in checkpoint.files if file.suffix == ".safetensors"]
    if not files:
        return Check("loading", note="no safetensors file")
    problems = []
    for file in files:
        try:
            with safe_open(file, framework="numpy") as opened:
                found = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}
        except (SafetensorError, OSError) as error:
            problems.append(f"{file.name}: the safetensors library says: {error}")
            continue
        wanted = {info.name: info.shape for info in checkpoint.tensors.values() if info.file == file}
        if found != wanted:
            problems.append(f"{file.name}: the safetensors library finds other tensors")
    return Check("loading", problems, "the safetensors library opens every file")
