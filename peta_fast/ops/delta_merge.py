"""The fused element-wise merge: what a method says (DeltaMerge), and its execution over raw buffers.

    delta -> sparsify -> mask -> prescale -> weight -> elect -> aggregate -> normalize -> scale -> add base -> cast

fp32, tasks in their given order, one rounding; the same bits on every instruction set, thread count and tiling.
Cost: each input read once, each output written once; thresholds and norms cost one more reading before that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from peta_fast.buffers import Buffer
from peta_fast.errors import CheckpointError
from peta_fast.ops import backend, order_statistics, records
from peta_fast.ops.merge_terms import Above as Above
from peta_fast.ops.merge_terms import All as All
from peta_fast.ops.merge_terms import Band, DeltaMerge, Keep, Random, RankedRandom, Term, Ties, Top
from peta_fast.ops.merge_terms import Nothing as Nothing
from peta_fast.ops.order_statistics import EVERYTHING, NOTHING, DeviceRank, Rank
from peta_fast.ops.task_statistics import task_statistics


@dataclass(frozen=True)
class MaskBuffer:
    """A mask as stored: floats, one byte an element ("BYTES") or one bit ("BITS", little-endian), over one tensor."""

    buffer: Buffer
    form: str


@dataclass(frozen=True)
class Inputs:
    """The tensors one merge reads.

    base    [*shape] or None
    models  T buffers of the same size
    masks   T masks, when the spec is masked
    labels  who the base (first) and the models are, for errors; files, as a rule
    streams (seed, position) that key each task's random numbers; else the seed of the merge, and the task's place
    """

    name: str
    shape: tuple[int, ...]
    base: Buffer | None
    models: tuple[Buffer, ...]
    masks: tuple[MaskBuffer, ...] = ()
    labels: tuple[str, ...] = ()
    streams: tuple[tuple[int, int], ...] = ()

    @property
    def size(self) -> int:
        return self.models[0].size

    @property
    def device(self) -> str:
        return self.models[0].device

    @property
    def row(self) -> int:
        """Elements of one row, for RankedRandom."""
        return self.shape[-1] if len(self.shape) > 1 else max(self.size, 1)

    def blocks(self, scope: str) -> int:
        """Into how many equal runs the trim scope cuts the tensor."""
        return self.shape[0] if scope == "row-block" and len(self.shape) > 2 else 1


def trim_size(shape: tuple[int, ...], scope: str) -> int:
    """Elements of one trim scope within a tensor of this shape (scope "model" is known to the caller alone)."""
    size = int(np.prod(shape, dtype=np.int64))
    return size // shape[0] if scope == "row-block" and len(shape) > 2 and shape[0] else size


@dataclass(frozen=True)
class Limit:
    """A threshold of one TASK record that only the device knows: csrc/order_statistics/ranks.cu."""

    task: int
    rank: DeviceRank
    high: bool
    first: int
    all: bool

    def record(self, at: int) -> tuple:
        return (self.rank.query, at, self.first, int(self.high), int(self.all))


@dataclass
class Prepared:
    """A DeltaMerge with everything known that the kernel needs: one TASK record a block and task, one RULE.

    limits  thresholds that are not in the records yet, since a device keeps them
    mask_prescales  by task, what its mask's mean multiplies
    """

    spec: DeltaMerge
    inputs: Inputs
    tasks: np.ndarray
    rule: tuple
    keeps: list[Keep] = field(default_factory=list)
    limits: list[Limit] = field(default_factory=list)
    mask_prescales: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Job:
    """Elements [start, stop) of a prepared merge, into a buffer of stop - start elements."""

    prepared: Prepared
    start: int
    stop: int
    out: Buffer


BASE_KINDS = {"tensor": records.BASE_TENSOR, "zero": records.BASE_ZERO, "one": records.BASE_ONE}
ELECTIONS = {None: records.ELECT_NONE, "weighted": records.ELECT_WEIGHTED, "unweighted": records.ELECT_UNWEIGHTED,
             "count": records.ELECT_COUNT}  # fmt: skip
AGGREGATES = {"sum": records.SUM, "max": records.MAX, "largest": records.LARGEST_FIRST,
              "largest-last": records.LARGEST_LAST, "median": records.MEDIAN}  # fmt: skip
DIVISORS = {"agreeing-weight": records.DIVIDE_AGREEING_WEIGHT, "agreeing-count": records.DIVIDE_AGREEING_COUNT}


def philox_key(seed: int, position: int, name: str) -> int:
    """The random stream of one task and tensor: the first 8 bytes of BLAKE2b, little-endian."""
    return int.from_bytes(hashlib.blake2b(f"{seed}\0{position}\0{name}".encode()).digest()[:8], "little")


def prepare(
    requests: Sequence[tuple[DeltaMerge, Inputs]],
    *,
    seed: int = 0,
    majority: int = 0,
    model_ranks: Sequence[Sequence[Rank]] | None = None,
    threads: int = 0,
) -> list[Prepared]:
    """Finds thresholds, norms and mask means of many tensors, with one reading of each.

    majority     the model's majority sign, for specs that need it
    model_ranks  by task, the ranks that `ranks_wanted` asks for, over the whole model, for specs of scope "model"
    """
    wanted = [_ranks_for(spec, inputs, model_ranks) for spec, inputs in requests]
    found = _select(requests, wanted, threads)
    prepared = [
        _prepare_one(spec, inputs, ranks, seed, majority, threads)
        for (spec, inputs), ranks in zip(requests, found, strict=True)
    ]
    _restore_l1(prepared, threads)
    return prepared


def ranks_wanted(keep: Keep) -> tuple[int, ...]:
    """The counts of largest magnitudes whose Rank this rule needs."""
    if isinstance(keep, Top):
        return (keep.count,)
    if isinstance(keep, Band):
        return (keep.skip + keep.count, keep.skip)
    return ()


def _ranks_for(spec, inputs, model_ranks):
    """Per block and task: counts to select, or Ranks that are already known."""
    if model_ranks is not None and spec.scope == "model":
        return [[list(r) for r in model_ranks]]
    return [[ranks_wanted(t.keep) for t in spec.terms] for _ in range(inputs.blocks(spec.scope))]


def _select(requests, wanted, threads) -> list[list[list[list[Rank]]]]:
    """Replaces counts by Ranks, all tensors in one native call."""
    selections, places = [], []
    for r, ((spec, inputs), blocks) in enumerate(zip(requests, wanted, strict=True)):
        step = inputs.size // max(len(blocks), 1)
        for b, tasks in enumerate(blocks):
            base = inputs.base.slice(b * step, (b + 1) * step) if inputs.base is not None else None
            for t, counts in enumerate(tasks):
                if counts and isinstance(counts[0], int):
                    x = inputs.models[t].slice(b * step, (b + 1) * step)
                    group = (r << 32) + b
                    index = spec.terms[t].keep.ties == "first"
                    kind = BASE_KINDS[spec.base]
                    selections.append(order_statistics.Selection(base, x, counts, kind, group, index))
                    places.append((r, b, t))
    ranks = order_statistics.kth_magnitudes(selections, threads=threads)
    found = [[list(tasks) for tasks in blocks] for blocks in wanted]
    for (r, b, t), result in zip(places, ranks, strict=True):
        found[r][b][t] = result
    return found


def _prepare_one(spec, inputs, ranks, seed, majority, threads) -> Prepared:
    blocks = len(ranks)
    step = inputs.size // max(blocks, 1)
    means = _mask_prescales(spec, inputs, threads)
    tasks = np.zeros(blocks * len(spec.terms), records.TASK)
    limits: list[Limit] = []
    for b in range(blocks):
        for t, term in enumerate(spec.terms):
            place = b * len(spec.terms) + t
            record = tasks[place]
            _fill_task(record, term, inputs, t, means[t])
            stream = inputs.streams[t] if inputs.streams else (seed, t)
            record["key"] = philox_key(*stream, inputs.name) if is_random(term.keep) else 0
            limits += _fill_keep(record, place, term.keep, ranks[b][t], b * step)
    return Prepared(spec, inputs, tasks, rule_of(spec, majority), [t.keep for t in spec.terms], limits, means)


def is_random(keep: Keep) -> bool:
    return isinstance(keep, (Random, RankedRandom))


def _fill_task(record, term: Term, inputs: Inputs, t: int, mask_prescale: float) -> None:
    x = inputs.models[t]
    record["x"], record["dtype"], record["is_delta"] = x.address, records.CODES[x.dtype], records.is_delta(x)
    record["weight"] = term.weight
    own = 1.0 if isinstance(term.prescale, str) else float(np.float32(term.prescale))
    record["prescale"] = own * mask_prescale
    record["by_probability"] = term.prescale == "1/p" and isinstance(term.keep, RankedRandom)
    if inputs.masks:
        mask = inputs.masks[t]
        record["mask"], record["mask_dtype"] = mask.buffer.address, records.CODES[mask.form]


def _fill_keep(record, place: int, keep: Keep, ranks: Sequence[Rank | DeviceRank], first: int) -> list[Limit]:
    """Thresholds and probabilities; `first` is the flat index of the block the ranks speak of. Returns the thresholds
    that only a device knows."""
    record["keep"] = records.KEEP_ALL
    if isinstance(keep, Nothing) or (ranks and ranks[0] == NOTHING):
        record["keep"] = records.KEEP_NONE
    elif isinstance(keep, Top) and ranks[0] != EVERYTHING:
        record["keep"] = records.KEEP_TOP
        return _fill_limits(record, place, ("low",), ranks, keep.ties, first)
    elif isinstance(keep, Band):
        record["keep"] = records.KEEP_BAND
        return _fill_limits(record, place, ("low", "high"), ranks, keep.ties, first)
    elif isinstance(keep, Above):
        record["keep"], record["low"], record["low_index"] = records.KEEP_TOP, records.bits(keep.threshold), -1
    elif isinstance(keep, Random):
        record["keep"], record["p"] = records.KEEP_RANDOM, keep.probability
    elif isinstance(keep, RankedRandom):
        record["keep"] = records.KEEP_RANDOM_PER_ELEMENT
    return []


def _fill_limits(record, place: int, fields: Sequence[str], ranks, ties: Ties, first: int) -> list[Limit]:
    left = []
    for name, rank in zip(fields, ranks, strict=True):
        if isinstance(rank, DeviceRank):
            left.append(Limit(place, rank, name == "high", first, ties == "all"))
        else:
            record[name], record[f"{name}_index"] = _limit(rank, ties, first)
    return left


def _limit(rank: Rank, ties: Ties, first: int) -> tuple[int, int]:
    if rank == NOTHING or rank == EVERYTHING:
        return rank.threshold, rank.last_index
    if ties == "all" or rank.last_index == records.LAST:
        return rank.threshold, records.LAST
    return rank.threshold, first + rank.last_index


def _mask_prescales(spec: DeltaMerge, inputs: Inputs, threads: int) -> list[float]:
    """1 / mean(mask) of every task, 0 where a mask keeps nothing; 1 when the spec does not ask for it."""
    if spec.mask_rescale != "mean" or not inputs.masks:
        return [1.0] * len(spec.terms)
    means: dict[int, float] = {}
    for mask in inputs.masks:
        if mask.buffer.address not in means:
            means[mask.buffer.address] = _mask_mean(mask, inputs.size, threads)
    return [1.0 / m if (m := means[mask.buffer.address]) else 0.0 for mask in inputs.masks]


def _mask_mean(mask: MaskBuffer, size: int, threads: int) -> float:
    if not size:
        return 0.0
    if mask.form not in ("BITS", "BYTES"):
        return float(task_statistics(None, [mask.buffer], base_kind=records.BASE_ZERO, threads=threads).sums[0]) / size
    if mask.buffer.device:
        return backend(mask.buffer.device).count_mask(mask.buffer.address, size, mask.form == "BITS") / size
    raw = np.frombuffer(mask.buffer.as_bytes(), np.uint8)
    if mask.form == "BYTES":
        return int(np.count_nonzero(raw[:size])) / size
    return int(np.unpackbits(raw, count=size, bitorder="little").sum()) / size


def rule_of(spec: DeltaMerge, majority: int) -> tuple:
    constant = not isinstance(spec.divide, str)
    fallback = {"drop": 0, "plus": 1, "minus": -1, "majority-minus": majority or -1, "majority-plus": majority or 1}
    return (
        BASE_KINDS[spec.base],
        ELECTIONS[spec.elect],
        fallback[spec.zero],
        AGGREGATES[spec.aggregate],
        records.DIVIDE_CONSTANT if constant else DIVISORS[spec.divide],
        spec.divide if constant else 1.0,
        0.0,
        spec.scaling,
    )


def merge(
    jobs: Sequence[Job], *, threads: int = 0, allow_nonfinite: bool = False, later: list[Verdict] | None = None
) -> None:
    """Runs the kernel over all jobs at once.

    later  takes what is to be looked at when a device is done; without it, a device is waited for

    Raises CheckpointError, naming input and tensor, when an input or a result is NaN or infinite.
    """
    batch = _Batch(threads)
    for job in jobs:
        batch.add(job)
    if not batch.device or not batch.pieces:
        verdict = Verdict(batch.owners, batch.run(records.MERGE))
    else:
        verdict = Verdict(batch.owners, None, batch.start(records.MERGE), batch.device)
    if allow_nonfinite:
        return
    if later is not None and batch.device:
        later.append(verdict)
    else:
        verdict.check()


@dataclass
class Verdict:
    """Whether all that a merge read and wrote is finite: in its PIECE records, which may still be a device's."""

    owners: list[tuple[Prepared, int, int]]
    table: np.ndarray | None
    held: Any = None
    device: str = ""

    def check(self) -> None:
        """Waits for the device. Raises CheckpointError, naming input and tensor."""
        if self.table is None:
            self.table, self.held = backend(self.device).pieces_of(self.held), None
        for i in np.flatnonzero(self.table["nonfinite"]):
            refuse_nonfinite(*self.owners[int(i)], int(self.table["nonfinite"][i]))


class _Batch:
    """Records of many jobs for one native call."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.device = ""
        self.pieces: list[tuple] = []
        self.tasks: list[np.ndarray] = []
        self.rules: list[tuple] = []
        self.owners: list[tuple[Prepared, int, int]] = []
        self.limits: list[tuple] = []
        self.keep_alive: list[Any] = []
        self.num_tasks = 0

    def add(self, job: Job) -> None:
        """A job is one piece a block of its trim scope; each piece has task records for its first element."""
        inputs, count = job.prepared.inputs, len(job.prepared.spec.terms)
        blocks = len(job.prepared.tasks) // count if count else 1
        step = max(inputs.size // max(blocks, 1), 1)
        self.device = inputs.device
        for start, stop, block in cut(job.start, job.stop, step, blocks):
            base = inputs.base.slice(start, stop) if inputs.base is not None else None
            out = job.out.slice(start - job.start, stop - job.start)
            self.pieces.append((
                base.address if base else 0, out.address, 0, 0, stop - start, start,
                self.num_tasks, 0, count, len(self.rules),
                records.CODES[base.dtype] if base else 0, records.CODES[out.dtype], 0, 0,
            ))  # fmt: skip
            self.add_tasks(job.prepared, block, start, stop)
            self.owners.append((job.prepared, start, stop))
        self.rules.append(job.prepared.rule)

    def add_tasks(self, prepared: Prepared, block: int, start: int, stop: int) -> np.ndarray:
        """The task records of one piece, a copy; they may be changed until the batch is run."""
        count = len(prepared.spec.terms)
        mine = prepared.tasks[block * count : (block + 1) * count].copy()
        point_at(mine, prepared, start, stop, self.keep_alive, self.threads)
        for limit in prepared.limits:
            if block * count <= limit.task < (block + 1) * count:
                self.limits.append(limit.record(self.num_tasks + limit.task - block * count))
        self.tasks.append(mine)
        self.num_tasks += count
        return mine

    def run(self, mode: int) -> np.ndarray:
        """The piece records, results filled in; a device is waited for."""
        if self.device and self.pieces:
            return backend(self.device).pieces_of(self.start(mode))
        table = np.array(self.pieces, records.PIECE)
        if len(table):
            tasks = np.concatenate(self.tasks)
            backend().delta_merge(mode, table, tasks, np.array(self.rules, records.RULE), self.threads)
        return table

    def start(self, mode: int) -> Any:
        """Launches on the device; what `pieces_of` takes."""
        from peta_fast.ops.device import RANK_REF

        tables = np.array(self.pieces, records.PIECE), np.concatenate(self.tasks), np.array(self.rules, records.RULE)
        return backend(self.device).start_merge(mode, *tables, np.array(self.limits, RANK_REF))


def cut(start: int, stop: int, step: int, blocks: int):
    """[start, stop) cut where the blocks of the trim scope end."""
    while start < stop:
        block = min(start // step, blocks - 1)
        end = stop if block == blocks - 1 else min(stop, (block + 1) * step)
        yield start, end, block
        start = end


def point_at(tasks, prepared: Prepared, start: int, stop: int, keep_alive, threads: int) -> None:
    """Moves task records to the elements [start, stop), computing what is needed for these alone."""
    inputs = prepared.inputs
    for t, record in enumerate(tasks):
        x = inputs.models[t].slice(start, stop)
        keep_alive.append(x)
        record["x"] = x.address
        if inputs.masks and inputs.masks[t].form != "BITS":
            width = 1 if inputs.masks[t].form == "BYTES" else inputs.masks[t].buffer.nbytes // max(inputs.size, 1)
            record["mask"] = inputs.masks[t].buffer.address + start * width
        keep = prepared.keeps[t]
        if isinstance(keep, RankedRandom):
            table, record["probability"] = _probabilities(prepared, t, keep, start, stop, threads)
            keep_alive.append(table)


def _probabilities(prepared: Prepared, t: int, keep: RankedRandom, start: int, stop: int, threads: int):
    """Keep probabilities of the elements [start, stop), from the ranks within all rows that they touch: memory that
    must stay alive, and the address of the first."""
    inputs = prepared.inputs
    first_row, last_row = start // inputs.row, -(-stop // inputs.row)
    delta = np.array(
        [records.delta_record(inputs.base, inputs.models[t], BASE_KINDS[prepared.spec.base])], records.DELTA
    )
    rows = (first_row, last_row - first_row, inputs.row, keep.low, keep.high)
    skipped = (start - first_row * inputs.row) * 4
    if inputs.device:
        held = backend(inputs.device).start_ranking(delta, *rows)
        return held, held.address + skipped
    out = np.empty((last_row - first_row) * inputs.row, np.float32)
    backend().ranked_probability(delta, *rows, out, threads)
    return out, out.__array_interface__["data"][0] + skipped


NORM_TILE = 1 << 22
"""Elements whose kept norm is taken at once: bounds the memory of ranked probabilities. A multiple of BLOCK."""


def _restore_l1(prepared: Sequence[Prepared], threads: int) -> None:
    """Multiplies the prescale of "l1" terms by sum |d| / sum |kept d|, in fp64 over the fixed tree, rounded once."""
    normed = [p for p in prepared if p.inputs.size and any(term.prescale == "l1" for term in p.spec.terms)]
    started = [_start_kept_norms(p, threads) for p in normed]
    for p, finish in zip(normed, started, strict=True):
        l1, count = finish(), len(p.spec.terms)
        for t, term in enumerate(p.spec.terms):
            if term.prescale != "l1":
                continue
            whole, kept = l1[t]
            restored = 1.0 if whole < 1e-7 or kept < 1e-7 else whole / kept
            p.tasks["prescale"][t::count] = restored * p.mask_prescales[t]


def _start_kept_norms(prepared: Prepared, threads: int) -> Callable[[], np.ndarray]:
    """What gives [T, 2] fp64: L1 norms of the task vectors, and of what the keep rules leave of them. A device is
    waited for only then."""
    size, count, device = prepared.inputs.size, len(prepared.spec.terms), prepared.inputs.device
    if len(prepared.tasks) != count:
        raise ValueError(f"{prepared.inputs.name}: prescale 'l1' goes with trim scope 'tensor' alone")
    blocks = -(-size // records.BLOCK)
    if device:
        held = backend(device).memory.empty(blocks * count * 16)
        _fill_partials(prepared, held.address, threads)
        sums = backend(device).tree_sums(held, blocks, 2 * count)
        return lambda: backend(device).download(sums, np.float64).reshape(count, 2)
    partials = np.zeros((blocks, count, 2))
    _fill_partials(prepared, partials.__array_interface__["data"][0], threads)
    return lambda: np.array(
        [[backend().tree_sum(np.ascontiguousarray(partials[:, t, k])) for k in range(2)] for t in range(count)]
    )


def _fill_partials(prepared: Prepared, partials: int, threads: int) -> None:
    """Tile by tile, into fp64 [blocks, T, 2] at the address."""
    size, count, inputs = prepared.inputs.size, len(prepared.spec.terms), prepared.inputs
    for start in range(0, size, NORM_TILE):
        stop = min(start + NORM_TILE, size)
        batch = _Batch(threads)
        batch.device = inputs.device
        tasks = batch.add_tasks(prepared, 0, start, stop)
        tasks["prescale"], tasks["mask"] = 1.0, 0
        base = inputs.base.slice(start, stop) if inputs.base is not None else None
        place = partials + start // records.BLOCK * count * 16
        batch.pieces.append((
            base.address if base else 0, 0, 0, place, stop - start, start, 0, 0,
            count, 0, records.CODES[base.dtype] if base else 0, 0, 0, 0,
        ))  # fmt: skip
        batch.rules.append((BASE_KINDS[prepared.spec.base], 0, 0, 0, 0, 1.0, 0.0, 1.0))
        if inputs.device:
            batch.start(records.KEPT_NORM)
        else:
            batch.run(records.KEPT_NORM)


def sign_total(prepared: Sequence[Prepared], *, threads: int = 0) -> int:
    """Sum over all elements of the sign of the elected total: positive where the model's majority is plus."""
    batch = _Batch(threads)
    for p in prepared:
        if p.inputs.size and p.spec.terms:
            batch.add(Job(p, 0, p.inputs.size, Buffer(0, "F32", p.inputs.size, None, p.inputs.device)))
    return int(batch.run(records.SIGN_TOTAL)["sign_total"].sum())


def with_majority(prepared: Prepared, majority: int) -> Prepared:
    """The same merge with the model's majority sign (-1, 0, 1) known."""
    return replace(prepared, rule=rule_of(prepared.spec, majority))


def refuse_nonfinite(prepared: Prepared, start: int, stop: int, flags: int) -> None:
    inputs = prepared.inputs
    everyone = ([inputs.base] if inputs.base is not None else []) + list(inputs.models)
    labels = inputs.labels or (("base",) if inputs.base is not None else ()) + tuple(
        f"model {t}" for t in range(len(inputs.models))
    )
    hint = "Mend that checkpoint, or allow NaN and inf with allow_nonfinite (--allow-nonfinite)."
    for label, buffer in zip(labels, everyone, strict=True):
        count = int(task_statistics(None, [buffer], base_kind=records.BASE_ZERO).nonfinite[0])
        if count:
            raise CheckpointError(label, f"{inputs.name!r}: expected finite values, got {count} NaN or inf", hint)
    if flags & 1:
        problem = "differences between models, masks or weights are not finite in fp32"
    else:
        problem = "the merged values overflow the output's dtype"
    raise CheckpointError(inputs.name, f"elements {start} to {stop}: {problem}", hint)
