"""Several merges of one tensor in one pass over it: variants of one recipe, or recipes that share a base.

    union of all terms -> contributions, each once -> for every variant: weight, elect, divide, scale, add base, cast

A term is a model's task vector with its keep rule, mask and prescale; variants that differ in weights, election,
divisor or scaling share them. The same arithmetic in the same order as delta_merge, so each variant has the bits of its
own merge. Cost: each input read once for all variants, each output written once; thresholds and norms of all terms one
more reading.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from peta_fast.buffers import ITEMSIZE, Buffer
from peta_fast.ops import backend, records
from peta_fast.ops.delta_merge import (
    BASE_KINDS,
    DeltaMerge,
    Inputs,
    Prepared,
    Term,
    cut,
    is_random,
    point_at,
    rule_of,
)


@dataclass(frozen=True)
class Shared:
    """What V merges of a tensor share, whatever the tensor's addresses.

    specs     V merges of the same base kind, trim scope and kind of mask
    union     a merge of all distinct terms, to be prepared with the Inputs that `origins` tells
    origins   for each distinct term, (variant, task) where it was first met
    terms     for each variant, the distinct term of each of its tasks
    uses, variants, rules   records, first_use and rule counted from the first of this merge
    """

    specs: tuple[DeltaMerge, ...]
    union: DeltaMerge
    origins: tuple[tuple[int, int], ...]
    terms: tuple[tuple[int, ...], ...]
    uses: np.ndarray
    variants: np.ndarray
    rules: np.ndarray

    def inputs(self, each: Sequence[Inputs], seeds: Sequence[int]) -> Inputs:
        """The inputs of the union, out of those of each variant."""
        first = each[0]
        models = tuple(each[v].models[t] for v, t in self.origins)
        masks = tuple(each[v].masks[t] for v, t in self.origins) if first.masks else ()
        skipped = first.base is not None
        labels = first.labels[:skipped] + tuple(each[v].labels[t + skipped] for v, t in self.origins if first.labels)
        streams = tuple((seeds[v], t) for v, t in self.origins)
        return Inputs(first.name, first.shape, first.base, models, masks, labels, streams)

    def of_variant(self, prepared: Prepared, variant: int) -> Prepared:
        """One variant as a merge of its own."""
        chosen, count = list(self.terms[variant]), len(self.origins)
        blocks = prepared.tasks.reshape(-1, count) if count else prepared.tasks.reshape(1, 0)
        tasks = blocks[:, chosen].reshape(-1)
        spec, whole = self.specs[variant], prepared.inputs
        tasks["weight"] = np.tile([term.weight for term in spec.terms], len(blocks))
        skipped = whole.base is not None
        inputs = replace(
            whole,
            models=tuple(whole.models[t] for t in chosen),
            masks=tuple(whole.masks[t] for t in chosen) if whole.masks else (),
            labels=whole.labels[:skipped] + tuple(whole.labels[t + skipped] for t in chosen if whole.labels),
            streams=tuple(whole.streams[t] for t in chosen),
        )
        return Prepared(spec, inputs, tasks, tuple(self.rules[variant].item()), [t.keep for t in spec.terms])


def kind_of(spec: DeltaMerge) -> tuple:
    """Merges of the same kind can be shared."""
    return spec.base, spec.scope, spec.masked, spec.mask_rescale


def share(
    specs: Sequence[DeltaMerge],
    models: Sequence[Sequence[Hashable]],
    seeds: Sequence[int],
    majorities: Sequence[int] = (),
) -> Shared:
    """Finds the distinct terms of V merges of one kind over one base.

    models      for each merge, what tells the model (and mask) of each task apart
    seeds       of random keep rules
    majorities  the model's majority sign under each merge, for those that need it
    """
    found: dict[tuple, int] = {}
    origins: list[tuple[int, int]] = []
    union: list[Term] = []
    terms = []
    for v, spec in enumerate(specs):
        mine = []
        for t, term in enumerate(spec.terms):
            stream = (seeds[v], t) if is_random(term.keep) else None
            key = models[v][t], term.keep, term.prescale, stream
            if key not in found:
                found[key] = len(union)
                union.append(Term(1.0, term.keep, term.prescale))
                origins.append((v, t))
            mine.append(found[key])
        terms.append(tuple(mine))
    first = specs[0]
    whole = DeltaMerge(
        tuple(union), base=first.base, scope=first.scope, masked=first.masked, mask_rescale=first.mask_rescale
    )
    uses = [(k, term.weight) for spec, mine in zip(specs, terms, strict=True) for k, term in zip(mine, spec.terms)]  # noqa: B905
    variants = np.zeros(len(specs), records.VARIANT)
    variants["uses"] = [len(mine) for mine in terms]
    variants["first_use"] = np.cumsum(variants["uses"]) - variants["uses"]
    variants["rule"] = np.arange(len(specs))
    rules = [rule_of(spec, majorities[v] if majorities else 0) for v, spec in enumerate(specs)]
    return Shared(
        tuple(specs), whole, tuple(origins), tuple(terms), np.array(uses, records.USE), variants,
        np.array(rules, records.RULE),
    )  # fmt: skip


@dataclass(frozen=True)
class VariantJob:
    """Elements [start, stop) of every variant, each into a buffer of stop - start elements.

    prepared  the union, prepared
    chosen    the variants that are made, and where each goes
    """

    shared: Shared
    prepared: Prepared
    start: int
    stop: int
    chosen: Sequence[int]
    outs: Sequence[Buffer]


def merge_variants(jobs: Sequence[VariantJob], *, threads: int = 0) -> list[np.ndarray]:
    """Runs the kernel over all jobs at once. Outputs must not overlap inputs.

    Returns for each job uint32 [chosen]: 0, or 1 for an input of the variant that is NaN or infinite, 2 for its result.
    """
    batch = _Batch(threads)
    for job in jobs:
        batch.add(job)
    return batch.run()


class _Batch:
    """Records of many jobs for one native call."""

    def __init__(self, threads: int):
        self.threads = threads
        self.groups: list[tuple] = []
        self.terms: list[np.ndarray] = []
        self.variants: list[np.ndarray] = []
        self.tables: dict[int, tuple[Shared, int, int]] = {}
        self.uses: list[np.ndarray] = []
        self.rules: list[np.ndarray] = []
        self.keep_alive: list[np.ndarray] = []
        self.num_terms = self.num_variants = self.num_uses = self.num_rules = 0
        self.owners: list[int] = []
        self.jobs = 0

    def add(self, job: VariantJob) -> None:
        shared, inputs = job.shared, job.prepared.inputs
        first_use, first_rule = self._tables_of(shared)
        chosen = np.asarray(job.chosen, np.int64)
        variants = shared.variants[chosen]
        variants["first_use"] += first_use
        variants["rule"] += first_rule
        variants["out_dtype"] = [records.CODES[out.dtype] for out in job.outs]
        addresses = np.array([out.address for out in job.outs], np.uint64)
        widths = np.array([ITEMSIZE[out.dtype] for out in job.outs], np.uint64)
        count = len(shared.origins)
        blocks = len(job.prepared.tasks) // count if count else 1
        step = max(inputs.size // max(blocks, 1), 1)
        for start, stop, block in cut(job.start, job.stop, step, blocks):
            mine = job.prepared.tasks[block * count : (block + 1) * count].copy()
            point_at(mine, job.prepared, start, stop, self.keep_alive, self.threads)
            base = inputs.base.slice(start, stop) if inputs.base is not None else None
            placed = variants.copy()
            placed["out"] = addresses + np.uint64(start - job.start) * widths
            self.groups.append((
                base.address if base else 0, stop - start, start, self.num_terms, self.num_variants, count,
                len(placed), BASE_KINDS[shared.union.base], records.CODES[base.dtype] if base else 0,
            ))  # fmt: skip
            self.terms.append(mine)
            self.variants.append(placed)
            self.num_terms += count
            self.num_variants += len(placed)
            self.owners.append(self.jobs)
        self.jobs += 1

    def _tables_of(self, shared: Shared) -> tuple[int, int]:
        """Where the uses and rules of these merges begin; tensors of the same shape share them."""
        if id(shared) not in self.tables:
            self.tables[id(shared)] = shared, self.num_uses, self.num_rules
            self.uses.append(shared.uses)
            self.rules.append(shared.rules)
            self.num_uses += len(shared.uses)
            self.num_rules += len(shared.rules)
        return self.tables[id(shared)][1:]

    def run(self) -> list[np.ndarray]:
        if not self.groups:
            return [np.zeros(0, np.uint32) for _ in range(self.jobs)]
        variants = np.concatenate(self.variants)
        backend().merge_variants(
            np.array(self.groups, records.GROUP),
            np.concatenate(self.terms),
            variants,
            np.concatenate(self.uses),
            np.concatenate(self.rules),
            self.threads,
        )
        found: list[np.ndarray | None] = [None] * self.jobs
        end = 0
        for owner, mine in zip(self.owners, self.variants, strict=True):
            begin, end = end, end + len(mine)
            flags = variants["nonfinite"][begin:end]
            found[owner] = flags if found[owner] is None else found[owner] | flags
        return [np.zeros(0, np.uint32) if flags is None else flags for flags in found]
