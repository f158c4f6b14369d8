"""The journal of a merge: what has reached the disk, so that a killed run resumes and a finished one can be verified.

One JSON object a line. The first line is the merge's fingerprint and layout; then one line a slab, written after the
slab, with its checksum; {"publishing": true} before the first file gets its name; {"done": true} at last. Lines that a
power cut has torn are ignored: what they spoke of is made again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from peta_fast.errors import CheckpointError, ResourceError
from peta_fast.formats import ShardLayout
from peta_fast.formats.disk import PARTIAL, resource_error, sync_directory

JOURNAL = "peta_fast_journal.jsonl"


@dataclass(frozen=True)
class Slab:
    """Bytes [start, stop) of one shard's file; start is a multiple of a page, stop too unless it ends the file."""

    shard: int
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


def slabs_of(layouts, slab_bytes: int) -> Iterator[Slab]:
    """All slabs of all shards, in file order."""
    for shard, layout in enumerate(layouts):
        for start in range(len(layout.header), layout.size, slab_bytes):
            yield Slab(shard, start, min(start + slab_bytes, layout.size))


def fingerprint(parts) -> str:
    """Of everything that the output's bytes depend on."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def head_of(mark: str, layouts: tuple[ShardLayout, ...]) -> dict:
    return {"fingerprint": mark, "shards": shards_of(layouts)}


def shards_of(layouts: tuple[ShardLayout, ...]) -> list[dict]:
    return [
        {
            "file": s.filename,
            "size": s.size,
            "data": len(s.header),
            "header": hashlib.blake2b(s.header, digest_size=16).hexdigest(),
        }
        for s in layouts
    ]


class Journal:
    """Appends to the journal of one output directory, which no other process may do meanwhile.

    head  the first line of a new journal; None goes on with the one that is there
    name  of its file

    Raises ResourceError when it cannot be written, or another process is at it.
    """

    def __init__(self, out: Path, head: dict | None, name: str = JOURNAL):
        self.path = out / name
        try:
            self._descriptor = os.open(self.path, os.O_RDWR | (os.O_CREAT if head else 0), 0o666)
        except OSError as error:
            raise resource_error(self.path, "opened", error) from error
        try:
            self._begin(head)
        except BaseException:
            self.close()
            raise

    def _begin(self, head: dict | None) -> None:
        self._lock()
        if head is None:
            os.ftruncate(self._descriptor, self.path.read_bytes().rfind(b"\n") + 1)
            return
        os.ftruncate(self._descriptor, 0)
        self.append(head)
        self.sync()
        sync_directory(self.path.parent)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ResourceError(
                str(self.path.parent), "another process is merging into this folder", "Wait for it, or stop it."
            ) from None
        except OSError:
            pass  # a filesystem without locks

    def append(self, entry: dict) -> None:
        line = json.dumps(entry, separators=(",", ":")).encode() + b"\n"
        try:
            os.lseek(self._descriptor, 0, os.SEEK_END)
            while line:
                line = line[os.write(self._descriptor, line) :]
        except OSError as error:
            raise resource_error(self.path, "written", error) from error

    def sync(self) -> None:
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise resource_error(self.path, "synced", error) from error

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


@dataclass(frozen=True)
class Record:
    """What a journal says.

    head        its first line
    checksums   by slab, those of slabs that were written more than once as they were written last
    publishing  whether files may have got their names
    done        whether the merge was finished
    """

    head: dict
    checksums: dict[Slab, int]
    publishing: bool
    done: bool


def read_journal(out: Path) -> Record | None:
    """None where there is no journal, or one without a whole line. Raises CheckpointError when its head is damaged."""
    path = out / JOURNAL
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(str(path), f"cannot be read: {error.strerror}") from error
    if not lines:
        return None
    head, *entries = map(_parse, lines)
    if not _is_head(head):
        raise CheckpointError(str(path), "expected a journal of a merge, found none", "Use --force to start anew.")
    slabs = {Slab(e["shard"], e["start"], e["stop"]): e["checksum"] for e in entries if _is_slab(e, head)}
    return Record(head, slabs, any(e.get("publishing") for e in entries), any(e.get("done") for e in entries))


def _parse(line: bytes) -> dict:
    try:
        entry = json.loads(line)
    except ValueError:
        return {}
    return entry if isinstance(entry, dict) else {}


def _is_head(entry: dict) -> bool:
    shards = entry.get("shards")
    fields = {"file": str, "size": int, "data": int, "header": str}
    return (
        isinstance(entry.get("fingerprint"), str)
        and isinstance(shards, list)
        and all(isinstance(s, dict) and all(type(s.get(k)) is t for k, t in fields.items()) for s in shards)
    )


def _is_slab(entry: dict, head: dict) -> bool:
    if not all(type(entry.get(k)) is int for k in ("shard", "start", "stop", "checksum")):
        return False
    if not 0 <= entry["shard"] < len(head["shards"]):
        return False
    shard = head["shards"][entry["shard"]]
    return shard["data"] <= entry["start"] < entry["stop"] <= shard["size"]


def sound_slabs(out: Path, record: Record, threads: int = 0) -> list[Slab]:
    """The slabs whose bytes on the disk have the checksum that the journal gives them, in file order."""
    sound = []
    for shard, entry in enumerate(record.head["shards"]):
        mapped = _map_shard(out, entry, record.publishing)
        if mapped is not None:
            slabs = sorted((s for s in record.checksums if s.shard == shard), key=lambda s: (s.start, s.stop))
            sound += [s for s in slabs if _checksum(mapped, s, threads) == record.checksums[s]]
    return sound


def uncovered(shard: int, entry: dict, sound: list[Slab]) -> list[Slab]:
    """The parts of a shard's data that lie in none of the sound slabs."""
    gaps, reached = [], entry["data"]
    for slab in sorted((s for s in sound if s.shard == shard), key=lambda s: s.start):
        if slab.start > reached:
            gaps.append(Slab(shard, reached, slab.start))
        reached = max(reached, slab.stop)
    return gaps + ([Slab(shard, reached, entry["size"])] if reached < entry["size"] else [])


def verify(out: str | Path) -> list[str]:
    """What differs between a finished output and its journal; nothing, when it is as it was written.

    Raises CheckpointError when there is no journal.
    """
    out = Path(out)
    record = read_journal(out)
    if record is None:
        raise CheckpointError(str(out), f"has no {JOURNAL} to verify it by")
    problems = [] if record.done else ["the merge was not finished"]
    sound = sound_slabs(out, record)
    for shard, entry in enumerate(record.head["shards"]):
        problems.extend(_shard_problems(out / entry["file"], shard, entry, sound))
    return problems


def _shard_problems(file: Path, shard: int, entry: dict, sound: list[Slab]) -> list[str]:
    if not file.exists():
        return [f"{file.name}: missing"]
    if file.stat().st_size != entry["size"]:
        return [f"{file.name}: expected {entry['size']} bytes, got {file.stat().st_size}"]
    with open(file, "rb") as stream:
        header = hashlib.blake2b(stream.read(entry["data"]), digest_size=16).hexdigest()
    problems = [] if header == entry["header"] else [f"{file.name}: the header differs"]
    return problems + [
        f"{file.name}: bytes {gap.start} to {gap.stop} differ from what was written"
        for gap in uncovered(shard, entry, sound)
    ]


def _map_shard(out: Path, entry: dict, published: bool):
    """The shard under its partial or, once files got their names, its final name; None where it is missing or short."""
    for name in (entry["file"] + PARTIAL, *([entry["file"]] if published else [])):
        path = out / name
        if path.exists() and path.stat().st_size >= entry["size"] > 0:
            with open(path, "rb") as stream:
                return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    return None


def _checksum(mapped, slab: Slab, threads: int) -> int:
    import numpy as np

    from peta_fast.ops import backend

    view = np.frombuffer(mapped, np.uint8, slab.size, slab.start)
    return backend().checksum(view.__array_interface__["data"][0], slab.size, threads)


def refuse_foreign(record: Record, mark: str, out: Path) -> None:
    """Raises ResourceError when the journal belongs to another merge."""
    if record.head["fingerprint"] != mark:
        raise ResourceError(
            str(out),
            "holds another merge: recipe, inputs or options differ from those it was begun with",
            "Use --force to start anew, or another output folder.",
        )
