"""The output folder of a merge: refused or resumed before any work, filled slab by slab, published at the end.

journal, *.partial  ->  all shards synced  ->  old model removed  ->  shards renamed  ->  index  ->  other files, config
"""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path

from peta_fast import methods
from peta_fast._companions import CONFIG, companions
from peta_fast.buffers import Buffer
from peta_fast.errors import CheckpointError, PetaFastError, ResourceError
from peta_fast.formats import ShardWriter, free_bytes, index_json
from peta_fast.formats._registry import is_weight_file
from peta_fast.formats.disk import (
    PARTIAL,
    make_directory,
    real_path,
    resource_error,
    sync_directory,
    write_whole,
)
from peta_fast.formats.shard_index import SUFFIX
from peta_fast.journal import (
    JOURNAL,
    Journal,
    Record,
    Slab,
    fingerprint,
    head_of,
    read_journal,
    refuse_foreign,
    shards_of,
    slabs_of,
    sound_slabs,
    uncovered,
    verify,
)
from peta_fast.ops import backend
from peta_fast.plan import Plan

SLACK = 8 << 20
"""Bytes of disk for everything but the shards."""
VERSION = 3
"""Of what the bytes depend on; older journals are not resumed when it changes."""
PAGE = 4096
INDEX = f"model.safetensors{SUFFIX}"
MODEL_FILE = re.compile(rf"(model|pytorch_model)(-\d{{5}}-of-\d{{5}})?\.(safetensors|bin)({re.escape(SUFFIX)})?")
"""Names by which a folder's model is found: what an earlier merge has left under them goes with --force."""


class Output:
    """One merge's output folder. Use it in a `with`.

    Raises CheckpointError for files of the inputs that cannot be read, ResourceError when the output may not or cannot
    be written.
    """

    def __init__(self, plan: Plan, out: Path, *, resume: bool, force: bool):
        self.plan, self.out, self.force = plan, out, force
        self.skipped = 0
        self.writers: list[ShardWriter] = []
        self.journal: Journal | None = None
        self._lock = threading.Lock()
        self.kept = self.publishing = self.created = False
        _refuse_inputs(plan, out)
        self.mark = fingerprint(_what_bytes_depend_on(plan))
        self.files = companions(plan)
        self.record = self._look(resume)
        self.finished = self.record is not None and self.record.done
        if self.record is None:
            self._refuse_full_disk()

    def _look(self, resume: bool) -> Record | None:
        """What a killed run has left, when it is to be resumed. Raises ResourceError when there is output already."""
        if not os.path.lexists(self.out):
            return None
        if not self.out.is_dir():
            raise ResourceError(
                str(self.out), "expected a folder for the output, found a file or a broken link",
                "Choose another folder.",
            )  # fmt: skip
        self._refuse_folders_in_the_way()
        record = None if self.force and not resume else read_journal(self.out)
        if record is not None and resume:
            if record.head["fingerprint"] == self.mark or not self.force:
                refuse_foreign(record, self.mark, self.out)
                return record
        if self.force:
            return None
        if record is not None and not record.done:
            raise ResourceError(
                str(self.out), "holds an unfinished merge", "Use --resume to go on with it, --force to start anew."
            )
        self._refuse_what_is_there()
        return None

    def _refuse_folders_in_the_way(self) -> None:
        names = [*(layout.filename for layout in self.plan.layouts), JOURNAL, *self.files]
        names += [p.name for p in self.out.iterdir() if MODEL_FILE.fullmatch(p.name)]
        for name in names:
            for path in (self.out / name, self.out / (name + PARTIAL)):
                if path.is_dir():
                    raise ResourceError(str(path), "expected a file or nothing there, found a folder", "Move it away.")

    def _refuse_what_is_there(self) -> None:
        def is_model(path: Path) -> bool:
            return is_weight_file(path) or path.name.endswith((SUFFIX, PARTIAL))

        held = sorted(p.name for p in self.out.iterdir() if is_model(p))
        if held:
            raise ResourceError(str(self.out), f"holds a checkpoint already ({held[0]})", "Use --force to replace it.")
        named = [name for name in self.files if os.path.lexists(self.out / name)]
        if named:
            raise ResourceError(
                str(self.out), f"holds {named[0]}, which the merge would replace", "Use --force to replace it."
            )

    def _refuse_full_disk(self) -> None:
        free, needed = free_bytes(self.out), self.plan.disk_needed + SLACK
        if free < needed:
            raise ResourceError(
                str(self.out), f"expected {needed:,} bytes of free disk, got {free:,}",
                "Free some space, or use another disk.",
            )  # fmt: skip

    def pending(self, threads: int) -> list[Slab]:
        """The slabs that are still to be made; opens the files they go to."""
        slabs = list(slabs_of(self.plan.layouts, self.plan.slab))
        if self.finished:
            self._require_unchanged()
            self.skipped = sum(s.size for s in slabs)
            return []
        try:
            if self.record is None:
                self._begin()
                left = slabs
            else:
                left = self._go_on(slabs, threads)
            for layout in self.plan.layouts:
                self.writers.append(ShardWriter(layout, self.out, resume=self.record is not None))
        except OSError as error:
            raise resource_error(self.out, "prepared", error) from error
        self.skipped = sum(s.size for s in slabs) - sum(s.size for s in left)
        return left

    def _require_unchanged(self) -> None:
        names = [*self.files, *([INDEX] if len(self.plan.layouts) > 1 else [])]
        problems = verify(self.out) + [f"{name}: missing" for name in names if not (self.out / name).exists()]
        if problems:
            raise ResourceError(
                str(self.out), f"was finished, and has changed since: {problems[0]}", "Use --force to merge anew."
            )

    def _begin(self) -> None:
        """A new journal. That of an earlier, finished merge is set aside until this one is published."""
        self.created = not self.out.exists()
        make_directory(self.out)
        old = _record_or_none(self.out)
        if old is not None and old.done:
            os.replace(self.out / JOURNAL, self._aside)
        try:
            self.journal = Journal(self.out, head_of(self.mark, self.plan.layouts))
        except ResourceError:
            self._take_journal_back()
            raise
        for path in self.out.iterdir():
            if path.name.endswith(PARTIAL) and MODEL_FILE.fullmatch(path.name.removesuffix(PARTIAL)):
                path.unlink()

    @property
    def _aside(self) -> Path:
        return self.out / f"{JOURNAL}.old"

    def _take_journal_back(self) -> None:
        if self._aside.exists():
            os.replace(self._aside, self.out / JOURNAL)

    def _go_on(self, slabs: list[Slab], threads: int) -> list[Slab]:
        """What a killed run has not left whole; takes back names that it gave while it published."""
        self.kept = True
        self.journal = Journal(self.out, None)
        sound = sound_slabs(self.out, self.record, threads)
        for layout in self.plan.layouts if self.record.publishing else ():
            final, partial = self.out / layout.filename, self.out / (layout.filename + PARTIAL)
            if final.exists() and not partial.exists():
                os.replace(final, partial)
        return _not_covered(slabs, sound, self.record.head["shards"])

    def write(self, slab: Slab, buffer: Buffer) -> None:
        """Puts a slab on the disk, then into the journal; any thread, in any order."""
        padded = min(-(-slab.size // PAGE) * PAGE, buffer.size)
        self.writers[slab.shard].write(slab.start, buffer.as_bytes()[:padded])
        checksum = backend().checksum(buffer.address, slab.size, 1)
        with self._lock:
            self.journal.append({"shard": slab.shard, "start": slab.start, "stop": slab.stop, "checksum": checksum})
            self.kept = True

    def finish(self) -> None:
        """Everything to the disk, then every name, the config's last."""
        if self.finished:
            return
        try:
            self._publish()
        except OSError as error:
            raise resource_error(self.out, "completed", error) from error
        self.finished = True

    def _publish(self) -> None:
        for writer in self.writers:
            writer.sync()
        self.publishing = True
        self.journal.append({"publishing": True})
        self.journal.sync()
        self._remove_old_model()
        for writer in self.writers:
            writer.publish()
        index = index_json(self.plan.layouts)
        if index is not None:
            write_whole(self.out / INDEX, index.encode())
        for name, content in self.files.items():
            make_directory((self.out / name).parent)
            write_whole(self.out / name, content if isinstance(content, bytes) else _read(content))
        self._aside.unlink(missing_ok=True)
        sync_directory(self.out)
        self.journal.append({"done": True})
        self.journal.sync()

    def _remove_old_model(self) -> None:
        """What an earlier merge has left goes before the first new name comes: first what makes it look whole."""
        old = [p for p in self.out.iterdir() if MODEL_FILE.fullmatch(p.name)]
        marks = [self.out / CONFIG] if CONFIG in self.files else []
        for path in [*marks, *sorted(old, key=lambda p: not p.name.endswith(SUFFIX))]:
            path.unlink(missing_ok=True)
        sync_directory(self.out)

    def __enter__(self) -> Output:
        return self

    def __exit__(self, kind, error, trace) -> None:
        for writer in self.writers:
            writer.close()
        if self._is_hopeless(error):
            self._clear()
        if self.journal:
            self.journal.close()

    def _is_hopeless(self, error: BaseException | None) -> bool:
        """Whether there is nothing to resume: a fault of the inputs, or no room to begin with."""
        publishing = self.publishing or (self.record is not None and self.record.publishing)
        if not isinstance(error, PetaFastError) or self.journal is None or publishing:
            return False
        return not (isinstance(error, ResourceError) and self.kept)

    def _clear(self) -> None:
        """As if the merge had not been begun."""
        for layout in self.plan.layouts:
            (self.out / (layout.filename + PARTIAL)).unlink(missing_ok=True)
        (self.out / JOURNAL).unlink(missing_ok=True)
        self._take_journal_back()
        if self.created:
            try:
                self.out.rmdir()
            except OSError:
                pass  # it holds something else by now


def _record_or_none(out: Path) -> Record | None:
    try:
        return read_journal(out)
    except CheckpointError:
        return None


def _not_covered(slabs: list[Slab], sound: list[Slab], shards: list[dict]) -> list[Slab]:
    """The slabs with a byte that no sound slab holds; those of a run with another --max-memory were cut otherwise."""
    left = []
    for number, shard in enumerate(shards):
        gaps = uncovered(number, shard, sound)
        for slab in (s for s in slabs if s.shard == number):
            if any(gap.start < slab.stop and slab.start < gap.stop for gap in gaps):
                left.append(slab)
    return left


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(str(path), f"cannot be read: {error.strerror}") from error


def _what_bytes_depend_on(plan: Plan) -> dict:
    return {
        "version": VERSION,
        "method": fingerprint(Path(methods.get(plan.recipe.method).__file__).read_text()),
        "tensors": [t.to_json() for t in plan.tensors],
        "recipe": [plan.recipe.method, plan.recipe.compat, plan.recipe.seed, plan.recipe.trim_scope],
        "inputs": [_identity(file) for file in _input_files(plan)],
        "shards": shards_of(plan.layouts),
    }


def _identity(file: Path) -> tuple[str, int, int]:
    try:
        state = file.stat()
    except OSError as error:
        raise CheckpointError(str(file), f"cannot be read any more: {error.strerror}") from error
    return str(real_path(file)), state.st_size, state.st_mtime_ns


def _input_files(plan: Plan) -> list[Path]:
    sources = *plan.sources.values(), plan.masks, *plan.beside.files.values()
    return [file for source in sources if source is not None for file in source.files]


def _refuse_inputs(plan: Plan, out: Path) -> None:
    """The output must be no input, lie in none, and hold none: nothing that is read may be replaced."""
    target = real_path(out)
    folders = {source.directory: str(ref) for ref, source in plan.sources.items() if source.directory}
    if plan.tokenizer is not None:
        folders[plan.tokenizer] = "tokenizer_source"
    for source in plan.sources.values():
        folders |= {folder: str(folder) for folder in getattr(source, "adapter_folders", ())}
    for folder, name in folders.items():
        place = real_path(folder)
        if target == place or place in target.parents:
            raise ResourceError(str(out), f"lies inside the input {name}", "Choose a folder outside of all inputs.")
    for path in (*folders, *_input_files(plan)):
        if target == real_path(path) or target in real_path(path).parents:
            raise ResourceError(str(out), f"holds the input {path}", "Choose a folder that holds no inputs.")
