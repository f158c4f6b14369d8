"""Carries out many plans at once: those whose outputs have the same tensors share every reading of their inputs.

As `run`, slab by slab in file order, with a slab of every output under way; thresholds and norms of a tensor are found
for all of them right before its first slab. A plan that fails is given up alone.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from peta_fast._output import PAGE, SLACK, Output
from peta_fast._variants import Targets, VariantEngine, selections_of
from peta_fast.buffers import Buffer
from peta_fast.errors import PetaFastError, ResourceError
from peta_fast.formats import free_bytes
from peta_fast.journal import Slab, slabs_of
from peta_fast.plan import BASIC_MEMORY, BATCH, RING, SLAB, SMALLEST_SLAB, Plan
from peta_fast.run import AHEAD, Batches, Content, Progress, ReadAhead, Report, Ring, clear, run

TOGETHER = 32
"""Outputs made in one pass over the inputs."""
SPARE = 2
"""Slabs on their way to the disk beside one of every output."""


@dataclass(frozen=True)
class Outcome:
    """What became of one plan: a report, or the error that ended it."""

    name: str
    out: Path
    report: Report | None
    error: PetaFastError | None


def run_all(
    named: Sequence[tuple[str, Plan, Path]],
    *,
    max_memory: int,
    resume: bool = False,
    force: bool = False,
    allow_nonfinite: bool = False,
    threads: int = 0,
    progress: Callable[[Progress], None] | None = None,
) -> list[Outcome]:
    """Carries out plans, each into its own folder, within one bound of memory; see `run` for the options.

    Raises ResourceError when the disk cannot take all of them.
    """
    _refuse_full_disk([(plan, out) for _, plan, out in named])
    options = {"resume": resume, "force": force, "allow_nonfinite": allow_nonfinite, "threads": threads}
    found: dict[str, Outcome] = {}
    meter = _Meter(named, progress)
    for lanes, slab in _together(named, max_memory):
        if len(lanes) == 1:
            outcomes = [_run_one(*lanes[0], options, meter)]
        else:
            outcomes = _Lanes(lanes, slab, options, meter).run()
        found.update((outcome.name, outcome) for outcome in outcomes)
    return [found[name] for name, _, _ in named]


def _refuse_full_disk(wanted: Sequence[tuple[Plan, Path]]) -> None:
    fresh = [(plan, out) for plan, out in wanted if not out.exists()]
    if not fresh:
        return
    needed, free = sum(plan.disk_needed + SLACK for plan, _ in fresh), free_bytes(fresh[0][1])
    if free < needed:
        raise ResourceError(
            str(fresh[0][1].parent), f"expected {needed:,} bytes of free disk for {len(fresh)} outputs, got {free:,}",
            "Free some space, use another disk, or make fewer.",
        )  # fmt: skip


def _run_one(name: str, plan: Plan, out: Path, options: dict, meter: _Meter) -> Outcome:
    try:
        return Outcome(name, out, run(plan, out, progress=meter.of_one(plan), **options), None)
    except PetaFastError as error:
        return Outcome(name, out, None, error)


def _together(
    named: Sequence[tuple[str, Plan, Path]], max_memory: int
) -> Iterator[tuple[list[tuple[str, Plan, Path]], int]]:
    """Plans whose outputs have the same shards and names, and which start from the same model; and their slab size."""
    groups: dict[tuple, list] = {}
    for entry in named:
        plan = entry[1]
        tensors = tuple((t.name, t.dtype, t.shape, t.action == "alias") for t in plan.tensors)
        shards = tuple((s.filename, s.header, s.size) for s in plan.layouts)
        groups.setdefault((plan.donor, tensors, shards), []).append(entry)
    for members in groups.values():
        taken: list = []
        for entry in members:
            if taken and (len(taken) == TOGETHER or _room(taken + [entry], max_memory) < SMALLEST_SLAB):
                yield taken, _slab(taken, max_memory)
                taken = []
            taken.append(entry)
        yield taken, _slab(taken, max_memory)


def _room(named: Sequence[tuple[str, Plan, Path]], max_memory: int) -> int:
    """Bytes that are left for one slab: what each merge takes beside its slabs is counted for each."""
    beside = sum(plan.peak_memory - BASIC_MEMORY - RING * plan.slab for _, plan, _ in named)
    return (max_memory - BASIC_MEMORY - beside) // (len(named) + SPARE)


def _slab(named: Sequence[tuple[str, Plan, Path]], max_memory: int) -> int:
    """The slab size with which one slab of every output, and some spare, fit into max_memory."""
    slab, room = SLAB, _room(named, max_memory)
    while slab > SMALLEST_SLAB and slab > room:
        slab //= 2
    return slab


class _Meter:
    """Adds up what has been done over all plans, and tells it."""

    def __init__(self, named: Sequence[tuple[str, Plan, Path]], tell):
        self.total = sum(plan.bytes_written for _, plan, _ in named)
        self.done, self.tell = 0, tell

    def add(self, count: int, tensor: str) -> None:
        self.done = min(self.done + count, self.total)
        if self.tell:
            self.tell(Progress(self.done, self.total, "merging", tensor))

    def of_one(self, plan: Plan):
        """A callback for `run` that counts its part of the whole."""
        before = self.done

        def told(state: Progress) -> None:
            share = state.done_bytes / max(1, state.total_bytes)
            self.done = before + int(plan.bytes_written * share)
            self.add(0, state.tensor)

        return told


class _Lane:
    """One plan under way."""

    def __init__(self, name: str, plan: Plan, out: Path):
        self.name, self.plan, self.out = name, plan, out
        self.output: Output | None = None
        self.pending: set[Slab] = set()
        self.error: BaseException | None = None
        self.open = False

    def begin(self, options: dict) -> None:
        try:
            self.output = Output(self.plan, self.out, resume=options["resume"], force=options["force"])
            self.output.__enter__()
            self.open = True
            self.pending = set(self.output.pending(options["threads"]))
        except PetaFastError as error:
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        self.error = self.error or error
        self.pending = set()
        self.close()

    def finish(self) -> None:
        if self.error is None:
            try:
                self.output.finish()
            except PetaFastError as error:
                self.error = error
        self.close()

    def close(self) -> None:
        if self.open:
            self.open = False
            error = self.error
            self.output.__exit__(type(error) if error else None, error, None)


class _Lanes:
    """Plans that share their readings."""

    def __init__(self, named, slab: int, options: dict, meter: _Meter):
        self.options, self.meter = options, meter
        self.lanes = [_Lane(name, dataclasses.replace(plan, slab=slab), out) for name, plan, out in named]

    def run(self) -> list[Outcome]:
        began = time.perf_counter()
        try:
            for lane in self.lanes:
                lane.begin(self.options)
            self._make()
            for lane in self.lanes:
                lane.finish()
        except BaseException as error:
            for lane in self.lanes:
                lane.error = lane.error or error
                lane.close()
            raise
        seconds = time.perf_counter() - began
        return [self._outcome(lane, seconds) for lane in self.lanes]

    def _outcome(self, lane: _Lane, seconds: float) -> Outcome:
        if lane.error is not None:
            if not isinstance(lane.error, PetaFastError):
                raise lane.error
            return Outcome(lane.name, lane.out, None, lane.error)
        skipped = lane.output.skipped
        left = 1 - skipped / max(1, sum(s.size for s in slabs_of(lane.plan.layouts, lane.plan.slab)))
        read = round(lane.plan.bytes_read * left / len(self.lanes))
        written = round(lane.plan.bytes_written * left)
        return Outcome(
            lane.name, lane.out, Report(lane.out, seconds, read, written, len(lane.plan.tensors), skipped), None
        )

    def _make(self) -> None:
        plans = [lane.plan for lane in self.lanes]
        first = plans[0]
        slabs = [s for s in slabs_of(first.layouts, first.slab) if any(s in lane.pending for lane in self.lanes)]
        if not slabs:
            return
        sources = {ref: source for plan in reversed(plans) for ref, source in plan.sources.items()}
        engine = VariantEngine(
            [p.recipe for p in plans],
            [p.tensors for p in plans],
            sources,
            [p.masks for p in plans],
            [p.beside for p in plans],
            threads=self.options["threads"],
            allow_nonfinite=self.options["allow_nonfinite"],
        )
        engine.find_model_statistics()
        content = Content(first)
        batches = Batches(first, content, slabs)
        batches.limit = min(batches.limit, 3 * BATCH // max(3, selections_of([p.tensors for p in plans])))
        readers = [ReadAhead(p) for p in {p.recipe.references(): p for p in plans}.values()]
        ring = Ring(first.slab, len(self.lanes) + SPARE)
        writer = _Writer(ring)
        try:
            for i, slab in enumerate(slabs):
                for reader in readers:
                    for ahead in slabs[i : i + 1 + AHEAD] if reader.needed else ():
                        reader.ask(content.parts(ahead))
                engine.get_ready([t.name for t in batches.beginning_at(i)])
                self._make_slab(engine, content, slab, ring, writer)
                engine.forget(batches.needed_after(i))
        finally:
            writer.finish()

    def _make_slab(self, engine: VariantEngine, content: Content, slab: Slab, ring: Ring, writer: _Writer) -> None:
        wanting = {v: lane for v, lane in enumerate(self.lanes) if slab in lane.pending and lane.error is None}
        buffers = {v: ring.take() for v in wanting}
        parts = content.parts(slab)
        for buffer in buffers.values():
            filled = 0
            for part in parts:
                clear(buffer, filled, part.offset)
                filled = part.offset + part.stop - part.start
            clear(buffer, filled, min(-(-slab.size // PAGE) * PAGE, buffer.size))
        engine.fill([
            Targets(p.tensor.name, p.start, p.stop,
                    {v: Buffer(b.address + p.offset, "U8", p.stop - p.start, b) for v, b in buffers.items()})
            for p in parts
        ])  # fmt: skip
        for v, lane in wanting.items():
            if v in engine.faults and lane.error is None:
                writer.drain()
                lane.fail(engine.faults[v])
            elif lane.error is not None:
                engine.faults.setdefault(v, lane.error)
            if lane.error is None:
                writer.put(lane, slab, buffers[v])
            else:
                ring.give_back(buffers[v])
            self.meter.add(slab.size, parts[-1].tensor.name)


class _Writer:
    """Writes slabs of all outputs in the order they come, on a thread of its own; a fault ends its own output alone."""

    def __init__(self, ring: Ring):
        self.ring = ring
        self.slabs: queue.Queue = queue.Queue()
        self.thread = threading.Thread(target=self._work, name="peta_fast writer", daemon=True)
        self.thread.start()

    def put(self, lane: _Lane, slab: Slab, buffer: Buffer) -> None:
        self.slabs.put((lane, slab, buffer))

    def _work(self) -> None:
        while (item := self.slabs.get()) is not None:
            lane, slab, buffer = item
            if lane.error is None:
                try:
                    lane.output.write(slab, buffer)
                except BaseException as error:  # the maker closes the output
                    lane.error = error
            self.ring.give_back(buffer)
            self.slabs.task_done()
        self.slabs.task_done()

    def drain(self) -> None:
        """Waits until nothing is queued."""
        self.slabs.join()

    def finish(self) -> None:
        self.slabs.put(None)
        self.thread.join()
