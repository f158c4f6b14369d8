"""The fused element-wise merge: what a method says (DeltaMerge), and its execution over raw buffers.

    delta -> sparsify -> mask -> prescale -> weight -> elect -> aggregate -> normalize -> scale -> add base -> cast

fp32, tasks in their given order, one rounding; the same bits on every instruction set, thread count and tiling.
Cost: each input read once, each output written once; thresholds and norms cost one more reading before that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from peta_fast.buffers import Buffer
from peta_fast.errors import CheckpointError
from peta_fast.ops import backend, order_statistics, records
from peta_fast.ops.order_statistics import EVERYTHING, NOTHING, Rank
from peta_fast.ops.task_statistics import task_statistics

Ties = Literal["all", "first"]
"""Which of the elements equal to a threshold belong: all of them, or the lowest indices up to the exact count."""


@dataclass(frozen=True)
class All:
    """Keeps every entry."""


@dataclass(frozen=True)
class Nothing:
    """Keeps no entry."""


@dataclass(frozen=True)
class Top:
    """Keeps the `count` largest |delta| of the trim scope."""

    count: int
    ties: Ties = "all"


@dataclass(frozen=True)
class Band:
    """Skips the `skip` largest |delta|, keeps the `count` after them.

    ties "all": lo <= |delta| < hi with lo the (skip + count)-th and hi the skip-th largest.
    """

    skip: int
    count: int
    ties: Ties = "all"


@dataclass(frozen=True)
class Above:
    """Keeps |delta| > threshold."""

    threshold: float


@dataclass(frozen=True)
class Random:
    """Keeps each entry with this probability, by Philox over (seed, task, tensor name, flat index)."""

    probability: float


@dataclass(frozen=True)
class RankedRandom:
    """Random with a probability that rises with the rank of |delta| in its row: `low` for the smallest, `high` for
    the largest. A row runs along the last dimension; a tensor of one dimension or none is one row."""

    low: float
    high: float


Keep = All | Nothing | Top | Band | Above | Random | RankedRandom


@dataclass(frozen=True)
class Term:
    """One task's part.

    weight    multiplies the task vector
    keep      which entries survive
    prescale  multiplies the survivors; "l1" restores the L1 norm of the whole task vector (1 where a norm < 1e-7);
              "1/p" multiplies each survivor of RankedRandom by 1 / its own probability
    """

    weight: float = 1.0
    keep: Keep = All()
    prescale: float | Literal["l1", "1/p"] = 1.0


@dataclass(frozen=True)
class DeltaMerge:
    """An element-wise merge of T tasks over one tensor, in the algebra of the fused kernel.

    base        what is subtracted and added again: the base tensor, zero (weights merged as they are) or one
    elect       how the sign is elected: by the sum of weighted deltas, of deltas, or of their signs; None for no sign
    zero        what a zero sum elects: nothing (base stays), plus, minus, or the majority sign of the whole model and,
                where that is 0 too, minus or plus
    aggregate   sum, max (of the agreeing), largest (magnitude overall; the first or last of equals), lower median
    divide      by a constant, by the sum of the agreeing weights, or by their number; exactly 0 counts as 1
    scaling     multiplies the merged delta
    scope       trim scope of Top and Band
    masked      every term is multiplied by its mask, then by 1 / mean(mask) when mask_rescale is "mean"
    """

    terms: tuple[Term, ...]
    base: Literal["tensor", "zero", "one"] = "tensor"
    elect: Literal["weighted", "unweighted", "count"] | None = None
    zero: Literal["drop", "plus", "minus", "majority-minus", "majority-plus"] = "drop"
    aggregate: Literal["sum", "max", "largest", "largest-last", "median"] = "sum"
    divide: float | Literal["agreeing-weight", "agreeing-count"] = 1.0
    scaling: float = 1.0
    scope: Literal["tensor", "row-block", "model"] = "tensor"
    masked: bool = False
    mask_rescale: Literal["none", "mean"] = "none"

    @property
    def needs_model_signs(self) -> bool:
        return self.zero.startswith("majority")

    @property
    def needs_model_thresholds(self) -> bool:
        return self.scope == "model" and any(isinstance(t.keep, (Top, Band)) for t in self.terms)


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


@dataclass
class Prepared:
    """A DeltaMerge with everything known that the kernel needs: one TASK record a block and task, one RULE."""

    spec: DeltaMerge
    inputs: Inputs
    tasks: np.ndarray
    rule: tuple
    keeps: list[Keep] = field(default_factory=list)


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
    return [
        _prepare_one(spec, inputs, ranks, seed, majority, threads)
        for (spec, inputs), ranks in zip(requests, found, strict=True)
    ]


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
                    selections.append(order_statistics.Selection(base, x, counts, BASE_KINDS[spec.base], group))
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
    for b in range(blocks):
        for t, term in enumerate(spec.terms):
            record = tasks[b * len(spec.terms) + t]
            _fill_task(record, term, inputs, t, means[t])
            stream = inputs.streams[t] if inputs.streams else (seed, t)
            record["key"] = philox_key(*stream, inputs.name) if is_random(term.keep) else 0
            _fill_keep(record, term.keep, ranks[b][t], b * step)
    prepared = Prepared(spec, inputs, tasks, rule_of(spec, majority), [t.keep for t in spec.terms])
    _restore_l1(prepared, means, threads)
    return prepared


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


def _fill_keep(record, keep: Keep, ranks: Sequence[Rank], first: int) -> None:
    """Thresholds and probabilities; `first` is the flat index of the block the ranks speak of."""
    record["keep"] = records.KEEP_ALL
    if isinstance(keep, Nothing) or (ranks and ranks[0] == NOTHING):
        record["keep"] = records.KEEP_NONE
    elif isinstance(keep, Top) and ranks[0] != EVERYTHING:
        record["keep"] = records.KEEP_TOP
        record["low"], record["low_index"] = _limit(ranks[0], keep.ties, first)
    elif isinstance(keep, Band):
        record["keep"] = records.KEEP_BAND
        record["low"], record["low_index"] = _limit(ranks[0], keep.ties, first)
        record["high"], record["high_index"] = _limit(ranks[1], keep.ties, first)
    elif isinstance(keep, Above):
        record["keep"], record["low"], record["low_index"] = records.KEEP_TOP, records.bits(keep.threshold), -1
    elif isinstance(keep, Random):
        record["keep"], record["p"] = records.KEEP_RANDOM, keep.probability
    elif isinstance(keep, RankedRandom):
        record["keep"] = records.KEEP_RANDOM_PER_ELEMENT


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


def merge(jobs: Sequence[Job], *, threads: int = 0, allow_nonfinite: bool = False) -> None:
    """Runs the kernel over all jobs at once.

    Raises CheckpointError, naming input and tensor, when an input or a result is NaN or infinite.
    """
    batch = _Batch(threads)
    for job in jobs:
        batch.add(job)
    table = batch.run(records.MERGE)
    if not allow_nonfinite:
        for i in np.flatnonzero(table["nonfinite"]):
            refuse_nonfinite(*batch.owners[int(i)], int(table["nonfinite"][i]))


class _Batch:
    """Records of many jobs for one native call."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.pieces: list[tuple] = []
        self.tasks: list[np.ndarray] = []
        self.rules: list[tuple] = []
        self.owners: list[tuple[Prepared, int, int]] = []
        self.keep_alive: list = []
        self.num_tasks = 0

    def add(self, job: Job) -> None:
        """A job is one piece a block of its trim scope; each piece has task records for its first element."""
        inputs, count = job.prepared.inputs, len(job.prepared.spec.terms)
        blocks = len(job.prepared.tasks) // count if count else 1
        step = max(inputs.size // max(blocks, 1), 1)
        for start, stop, block in cut(job.start, job.stop, step, blocks):
            mine = job.prepared.tasks[block * count : (block + 1) * count].copy()
            point_at(mine, job.prepared, start, stop, self.keep_alive, self.threads)
            base = inputs.base.slice(start, stop) if inputs.base is not None else None
            out = job.out.slice(start - job.start, stop - job.start)
            self.pieces.append((
                base.address if base else 0, out.address, 0, 0, stop - start, start,
                self.num_tasks, 0, count, len(self.rules),
                records.CODES[base.dtype] if base else 0, records.CODES[out.dtype], 0, 0,
            ))  # fmt: skip
            self.tasks.append(mine)
            self.num_tasks += count
            self.owners.append((job.prepared, start, stop))
        self.rules.append(job.prepared.rule)

    def run(self, mode: int) -> np.ndarray:
        """The piece records, results filled in."""
        table = np.array(self.pieces, records.PIECE)
        if len(table):
            tasks = np.concatenate(self.tasks)
            backend().delta_merge(mode, table, tasks, np.array(self.rules, records.RULE), self.threads)
        return table


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
            table = _probabilities(prepared, t, keep, start, stop, threads)
            keep_alive.append(table)
            record["probability"] = table.__array_interface__["data"][0]


def _probabilities(prepared: Prepared, t: int, keep: RankedRandom, start: int, stop: int, threads: int) -> np.ndarray:
    """Keep probabilities of the elements [start, stop), from the ranks within all rows that they touch."""
    inputs = prepared.inputs
    first_row, last_row = start // inputs.row, -(-stop // inputs.row)
    out = np.empty((last_row - first_row) * inputs.row, np.float32)
    delta = records.delta_record(inputs.base, inputs.models[t], BASE_KINDS[prepared.spec.base])
    backend().ranked_probability(
        np.array([delta], records.DELTA), first_row, last_row - first_row, inputs.row, keep.low, keep.high, out, threads
    )
    return out[start - first_row * inputs.row :]


NORM_TILE = 1 << 22
"""Elements whose kept norm is taken at once: bounds the memory of ranked probabilities. A multiple of BLOCK."""


def _restore_l1(prepared: Prepared, mask_prescales: Sequence[float], threads: int) -> None:
    """Multiplies the prescale of "l1" terms by sum |d| / sum |kept d|, in fp64 over the fixed tree, rounded once."""
    chosen = [t for t, term in enumerate(prepared.spec.terms) if term.prescale == "l1"]
    if not chosen or not prepared.inputs.size:
        return
    l1 = _kept_norms(prepared, threads)
    count = len(prepared.spec.terms)
    for t in chosen:
        whole, kept = l1[t]
        restored = 1.0 if whole < 1e-7 or kept < 1e-7 else whole / kept
        prepared.tasks["prescale"][t::count] = restored * mask_prescales[t]


def _kept_norms(prepared: Prepared, threads: int) -> np.ndarray:
    """[T, 2] fp64: L1 norms of the task vectors, and of what the keep rules leave of them."""
    size, count = prepared.inputs.size, len(prepared.spec.terms)
    partials = np.zeros((-(-size // records.BLOCK), count, 2))
    if len(prepared.tasks) != count:
        raise ValueError(f"{prepared.inputs.name}: prescale 'l1' goes with trim scope 'tensor' alone")
    for start in range(0, size, NORM_TILE):
        stop = min(start + NORM_TILE, size)
        tasks, keep_alive = prepared.tasks.copy(), []
        tasks["prescale"] = 1.0
        point_at(tasks, prepared, start, stop, keep_alive, threads)
        tasks["mask"] = 0
        base = prepared.inputs.base
        piece = np.zeros(1, records.PIECE)
        piece["base"] = base.slice(start, stop).address if base is not None else 0
        piece["base_dtype"] = records.CODES[base.dtype] if base is not None else 0
        piece["partials"] = partials[start // records.BLOCK :].__array_interface__["data"][0]
        piece["size"], piece["start"], piece["tasks"] = stop - start, start, count
        rule = np.array([(BASE_KINDS[prepared.spec.base], 0, 0, 0, 0, 1.0, 0.0, 1.0)], records.RULE)
        backend().delta_merge(records.KEPT_NORM, piece, tasks, rule, threads)
    flat = [[backend().tree_sum(np.ascontiguousarray(partials[:, t, k])) for k in range(2)] for t in range(count)]
    return np.array(flat)


def sign_total(prepared: Sequence[Prepared], *, threads: int = 0) -> int:
    """Sum over all elements of the sign of the elected total: positive where the model's majority is plus."""
    batch = _Batch(threads)
    for p in prepared:
        if p.inputs.size and p.spec.terms:
            batch.add(Job(p, 0, p.inputs.size, Buffer(0, "F32", p.inputs.size)))
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
