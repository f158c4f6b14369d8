"""Runs a plan: read, merge, write, in bounded memory, so that a kill at any moment loses nothing.

Output slabs are made one after another in file order. All threads work on one slab at a time; a finished one goes to
one of three writer threads, past the page cache where the filesystem allows it, while the next is made, and the kernel
is asked to read ahead what lies on the disk. Thresholds and norms of a tensor are found right before its first slab,
when its bytes are about to be read anyway.

Files appear at the end: shards, index, other files, config last.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from peta_fast._engine import Engine, Piece
from peta_fast._output import PAGE, Output
from peta_fast._tensor_plan import TensorPlan, is_whole_tensor
from peta_fast.buffers import ITEMSIZE, Buffer
from peta_fast.journal import Slab, slabs_of
from peta_fast.plan import RING, Plan, batch_size

AHEAD = 16
"""Slabs whose inputs the kernel is asked to read ahead when they are not in memory."""
WRITERS = 3
"""Threads that write: a solid-state disk wants two direct writes at once, while the third sums what it wrote."""


@dataclass(frozen=True)
class Progress:
    """Bytes of readings and writing done, of those the plan counts.

    phase  "statistics" of the whole model, "merging", or "writing": waiting for the disk
    """

    done_bytes: int
    total_bytes: int
    phase: str
    tensor: str


@dataclass(frozen=True)
class Report:
    """What a run did: bytes it read and wrote. skipped_bytes were found on the disk by --resume.

    notes  by tensor, what a method that solves has to say: residuals, ridge; of tensors that this run made
    """

    out: Path
    seconds: float
    bytes_read: int
    bytes_written: int
    tensors: int
    skipped_bytes: int
    notes: dict[str, dict] = field(default_factory=dict)

    def to_json(self) -> dict:
        return {**asdict(self), "out": str(self.out)}


def run(
    plan: Plan,
    out: str | Path,
    *,
    resume: bool = False,
    force: bool = False,
    allow_nonfinite: bool = False,
    threads: int = 0,
    device: str = "cpu",
    progress: Callable[[Progress], None] | None = None,
) -> Report:
    """Carries out a plan.

    device           where tensors are merged: "cpu", "cuda" or "cuda:N"; the bits are the same

    resume           go on where a killed run of the same plan stopped; where nothing was begun, begin
    force            replace what is in `out`; with resume, only where it is not of the same plan
    allow_nonfinite  NaN and inf in inputs are no error
    threads          0: one a core

    Raises CheckpointError when an input holds NaN or inf, ResourceError when the output cannot be written or is there
    already. Nothing is published unless everything is.
    """
    began = time.perf_counter()
    with Output(plan, Path(out), resume=resume, force=force) as output:
        pending = output.pending(threads)
        content = Content(plan)
        meter = _Meter(plan, content, pending, progress)
        notes: dict[str, dict] = {}
        if pending:
            engine = _engine(plan, device, threads=threads, allow_nonfinite=allow_nonfinite)
            notes = engine.notes
            engine.find_model_statistics(meter.add_reading)
            try:
                if device != "cpu":
                    engine.feed(_all_batches(plan, content, pending))
                _make_slabs(plan, engine, output, pending, content, meter)
            finally:
                if device != "cpu":
                    engine.stop()
        meter.add(0, "writing")
        output.finish()
    seconds = time.perf_counter() - began
    return Report(Path(out), seconds, meter.to_read, meter.to_write, len(plan.tensors), output.skipped, notes)


def _engine(plan: Plan, device: str, **keywords) -> Engine:
    given = (plan.recipe, plan.tensors, plan.sources, plan.masks)
    if device == "cpu":
        return Engine(*given, beside=plan.beside, **keywords)
    from peta_fast._device_engine import DeviceEngine

    where = "cuda:0" if device == "cuda" else device
    return DeviceEngine(*given, device=where, beside=plan.beside, **keywords)


def _all_batches(plan: Plan, content: Content, pending: list[Slab]) -> list[list[TensorPlan]]:
    """What `beginning_at` will give, slab by slab."""
    batches, found, i = Batches(plan, content, pending), [], 0
    while i < len(pending):
        found.append(batches.beginning_at(i))
        i = batches.stop
    return found


class _Meter:
    """Adds up what has been done and tells it; what a killed run has left counts as done."""

    def __init__(self, plan: Plan, content: Content, pending: list[Slab], tell: Callable[[Progress], None] | None):
        skipped = set(slabs_of(plan.layouts, plan.slab)).difference(pending)
        self.to_read = plan.bytes_read - sum(content.bytes_read(slab) for slab in skipped) if pending else 0
        self.to_write = plan.bytes_written - sum(slab.size for slab in skipped) if pending else 0
        self.tell = tell
        self.total = plan.bytes_read + plan.bytes_written
        self.done = self.total - self.to_read - self.to_write

    def add(self, count: int, phase: str, tensor: str = "") -> None:
        self.done = min(self.done + count, self.total)
        if self.tell:
            self.tell(Progress(self.done, self.total, phase, tensor))

    def add_reading(self, tensor: TensorPlan) -> None:
        self.add(tensor.input_bytes, "statistics", tensor.name)


def _make_slabs(plan: Plan, engine: Engine, output: Output, pending: list[Slab], content: Content, meter) -> None:
    ring = Ring(plan.slab, min(RING, len(pending)))
    writer = _Writer(output, ring)
    reader = ReadAhead(plan)
    batches = Batches(plan, content, pending)
    release, factors = _Release(plan), _FactorsAhead(plan)
    try:
        for i, slab in enumerate(pending):
            for ahead in pending[i : i + 1 + AHEAD] if reader.needed else ():
                reader.ask(content.parts(ahead))
            if fresh := batches.beginning_at(i):
                factors.stop_preparing()
                engine.get_ready(fresh)
                factors.prepare(batches.following())
            buffer = ring.take()
            parts = content.parts(slab)
            _fill(engine, parts, buffer, slab.size)
            writer.put(slab, buffer)
            kept = batches.needed_after(i)
            engine.forget(kept)
            release.put([t for name, t in batches.tensors.items() if name not in kept])
            meter.add(content.bytes_read(slab) + slab.size, "merging", parts[-1].tensor.name)
    except BaseException:
        writer.abandon()
        raise
    finally:
        factors.finish()
        release.finish()
    writer.finish()


class Batches:
    """Runs of slabs whose tensors are got ready together: statistics of many small tensors in one call."""

    def __init__(self, plan: Plan, content: Content, pending: list[Slab]):
        self.content, self.pending = content, pending
        self.limit = 0 if is_whole_tensor(plan.recipe) else batch_size(plan.slab)
        self.stop = 0
        self.tensors: dict[str, TensorPlan] = {}

    def beginning_at(self, i: int) -> list[TensorPlan]:
        """The tensors of the batch that begins with the i-th slab; none where a batch is under way."""
        if i < self.stop:
            return []
        self.tensors, self.stop = self._from(i)
        return list(self.tensors.values())

    def following(self) -> list[TensorPlan]:
        """The tensors of the batch after the one under way."""
        return list(self._from(self.stop)[0].values())

    def _from(self, i: int) -> tuple[dict[str, TensorPlan], int]:
        """The tensors of the batch that begins with the i-th slab, and the slab after it."""
        tensors, size, stop = {}, 0, i
        while stop < len(self.pending):
            found = {p.tensor.name: p.tensor for p in self.content.parts(self.pending[stop])}
            fresh = sum(t.size for name, t in found.items() if name not in tensors)
            if stop > i and fresh and size + fresh > self.limit:
                break
            tensors.update(found)
            size, stop = size + fresh, stop + 1
        return tensors, stop

    def needed_after(self, i: int) -> set[str]:
        """The names of tensors that later slabs of this batch, or the next slab, still need."""
        if i + 1 < self.stop:
            return set(self.tensors)
        following = self.content.parts(self.pending[i + 1]) if i + 1 < len(self.pending) else []
        return {p.tensor.name for p in following}


def _fill(engine: Engine, parts: list[Part], buffer: Buffer, size: int) -> None:
    """Makes one slab of `size` bytes; what no tensor covers is zero, to the end of the last page."""
    filled = 0
    for part in parts:
        clear(buffer, filled, part.offset)
        filled = part.offset + part.stop - part.start
    clear(buffer, filled, min(-(-size // PAGE) * PAGE, buffer.size))
    engine.fill(
        [
            Piece(p.tensor, p.start, p.stop, Buffer(buffer.address + p.offset, "U8", p.stop - p.start, buffer))
            for p in parts
        ]
    )


def clear(buffer: Buffer, start: int, stop: int) -> None:
    """Zeros the bytes [start, stop)."""
    if stop > start:
        buffer.as_bytes()[start:stop] = bytes(stop - start)


@dataclass(frozen=True)
class Part:
    """Bytes [start, stop) of a tensor's output at `offset` within a slab."""

    tensor: TensorPlan
    start: int
    stop: int
    offset: int


class Content:
    """Which parts of which tensors each slab holds."""

    def __init__(self, plan: Plan):
        by_name = {t.name: t for t in plan.tensors}
        self.shards = []
        for layout in plan.layouts:
            tensors = [by_name[name] for name in layout.offsets]
            starts = np.fromiter(layout.offsets.values(), np.int64, len(tensors))
            self.shards.append((tensors, starts))

    def parts(self, slab: Slab) -> list[Part]:
        tensors, starts = self.shards[slab.shard]
        first = max(int(np.searchsorted(starts, slab.start, "right")) - 1, 0)
        found = []
        for i in range(first, len(tensors)):
            at, nbytes = int(starts[i]), tensors[i].nbytes
            if at >= slab.stop:
                break
            start, stop = max(slab.start - at, 0), min(slab.stop - at, nbytes)
            if start < stop:
                found.append(Part(tensors[i], start, stop, at + start - slab.start))
        return found

    def bytes_read(self, slab: Slab) -> int:
        """Of the inputs, the share that goes into one slab."""
        count = 0.0
        for part in self.parts(slab):
            readings = part.tensor.input_bytes * part.tensor.costs.readings
            count += readings * (part.stop - part.start) / part.tensor.nbytes
        return round(count)


class Ring:
    """Page-aligned buffers that go from the maker to the writer and back."""

    def __init__(self, size: int, count: int):
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self.maps = [mmap.mmap(-1, size, flags=private) for _ in range(count)]
        self.free: queue.SimpleQueue = queue.SimpleQueue()
        for mapped in self.maps:
            if hasattr(mmap, "MADV_HUGEPAGE"):
                mapped.madvise(mmap.MADV_HUGEPAGE)  # a direct write pins its pages one by one
            address = np.frombuffer(mapped, np.uint8).__array_interface__["data"][0]
            self.free.put(Buffer(address, "U8", size, mapped))
        self.broken: BaseException | None = None

    def take(self) -> Buffer:
        """A free buffer; raises what the writer died of."""
        buffer = self.free.get()
        if self.broken:
            raise self.broken
        return buffer

    def give_back(self, buffer: Buffer) -> None:
        self.free.put(buffer)


class _Writer:
    """Writes slabs, begun in the order they come, on threads of its own."""

    def __init__(self, output: Output, ring: Ring):
        self.output, self.ring = output, ring
        self.slabs: queue.SimpleQueue = queue.SimpleQueue()
        self.threads = [
            threading.Thread(target=self._work, name=f"peta_fast writer {i}", daemon=True) for i in range(WRITERS)
        ]
        for thread in self.threads:
            thread.start()

    def put(self, slab: Slab, buffer: Buffer) -> None:
        self.slabs.put((slab, buffer))

    def _work(self) -> None:
        while (item := self.slabs.get()) is not None:
            slab, buffer = item
            if self.ring.broken is None:
                try:
                    self.output.write(slab, buffer)
                except BaseException as error:  # reaches the maker with its next buffer
                    self.ring.broken = error
            self.ring.give_back(buffer)

    def finish(self) -> None:
        self.abandon()
        if self.ring.broken:
            raise self.ring.broken

    def abandon(self) -> None:
        """After a fault of the maker: what is queued is still written, its own faults no longer matter."""
        for _ in self.threads:
            self.slabs.put(None)
        for thread in self.threads:
            thread.join()


class _Release:
    """Unmaps inputs that are done with, on a thread of its own, while others wait for the disk.

    Left to the end of the process, one thread would do it for all of them, with nothing else going on.
    """

    def __init__(self, plan: Plan):
        self.sources = plan.sources
        self.tensors: queue.SimpleQueue = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._work, name="peta_fast release", daemon=True)
        self.thread.start()

    def put(self, tensors: list[TensorPlan]) -> None:
        self.tensors.put(tensors)

    def _work(self) -> None:
        while (tensors := self.tensors.get()) is not None:
            for tensor in tensors:
                for ref, name in tensor.inputs:
                    self.sources[ref].release(name)

    def finish(self) -> None:
        self.tensors.put(None)
        self.thread.join()


class _FactorsAhead:
    """Gets low-rank factors of the next batch ready, on a thread of its own, while this one is merged.

    What goes wrong here goes wrong again where the factors are wanted, and is told there.
    """

    def __init__(self, plan: Plan):
        self.sources = {ref: source for ref, source in plan.sources.items() if hasattr(source, "prepare")}
        self.places: queue.SimpleQueue = queue.SimpleQueue()
        self.thread = None
        if self.sources:
            self.thread = threading.Thread(target=self._work, name="peta_fast factors", daemon=True)
            self.thread.start()

    def prepare(self, tensors: list[TensorPlan]) -> None:
        for ref, name in dict.fromkeys(place for t in tensors if t.action == "merge" for place in t.inputs):
            if ref in self.sources:
                self.places.put((ref, name))

    def stop_preparing(self) -> None:
        """What has not been begun stays undone: whoever asks for it now does it."""
        with contextlib.suppress(queue.Empty):
            while True:
                self.places.get_nowait()

    def _work(self) -> None:
        while (place := self.places.get()) is not None:
            with contextlib.suppress(Exception):
                self.sources[place[0]].prepare(place[1])

    def finish(self) -> None:
        if self.thread is not None:
            self.stop_preparing()
            self.places.put(None)
            self.thread.join()


class ReadAhead:
    """Asks the kernel for inputs, each range once; `needed` where they seem not to be in memory yet."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.asked: dict[str, int] = {}
        self.needed = not all(_is_resident(f) for s in plan.sources.values() for f in getattr(s, "files", ()))

    def ask(self, parts: list[Part]) -> None:
        for part in parts:
            tensor, width = part.tensor, ITEMSIZE[part.tensor.dtype]
            stop = tensor.size if tensor.costs.readings > 1 else part.stop // width
            start = self.asked.get(tensor.name, part.start // width)
            if stop > start:
                self.asked[tensor.name] = stop
                for ref, name in tensor.inputs:
                    self.plan.sources[ref].prefetch(name, start, stop)


def _is_resident(file: Path, samples: int = 16) -> bool:
    """Whether a file seems to be in the page cache, by reading a few bytes that must not wait for the disk."""
    flag = getattr(os, "RWF_NOWAIT", None)
    if flag is None:
        return False
    with open(file, "rb", buffering=0) as stream:
        size = os.fstat(stream.fileno()).st_size
        for i in range(samples):
            try:
                os.preadv(stream.fileno(), [bytearray(1)], i * max(size - 1, 0) // max(samples - 1, 1), flag)
            except OSError:
                return False
    return True
