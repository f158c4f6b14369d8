"""Merges the same tensors by several recipes at once: what they share is read, ranked and drawn once."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from peta_fast._assignment import Source
from peta_fast._beside import Beside
from peta_fast._engine import Engine, Piece
from peta_fast._tensor_plan import TensorPlan, is_whole_tensor, mask_name, spec_of, wants_gram, wants_model_gram
from peta_fast.buffers import ITEMSIZE, MERGEABLE, Buffer
from peta_fast.errors import PetaFastError
from peta_fast.ops.delta_merge import (
    DeltaMerge,
    Inputs,
    Job,
    Prepared,
    merge,
    prepare,
    ranks_wanted,
    refuse_nonfinite,
    sign_total,
    with_majority,
)
from peta_fast.ops.merge_variants import Shared, VariantJob, kind_of, merge_variants, share
from peta_fast.ops.order_statistics import MagnitudeHistogram
from peta_fast.ops.records import BASE_ZERO
from peta_fast.ops.task_statistics import task_statistics
from peta_fast.recipe import ModelRef, Recipe


@dataclass(frozen=True)
class Part:
    """Variants of one tensor that share a pass, and what that pass needs."""

    variants: tuple[int, ...]
    shared: Shared
    prepared: Prepared


@dataclass(frozen=True)
class Targets:
    """Bytes [start, stop) of one tensor's output, and where they go, by variant."""

    name: str
    start: int
    stop: int
    buffers: Mapping[int, Buffer]


class VariantEngine:
    """Makes outputs of V recipes whose outputs have the same names and shapes.

    recipes, plans, masks, besides  one a variant; plans are the tensors of `plan_tensors`, equal in names, order and
             shapes, besides what that filled
    sources  all models of all recipes
    faults   by variant, why it is given up; it is left out from then on
    """

    def __init__(
        self,
        recipes: Sequence[Recipe],
        plans: Sequence[Sequence[TensorPlan]],
        sources: Mapping[ModelRef, Source],
        masks: Sequence[Source | None],
        besides: Sequence[Beside],
        *,
        threads: int = 0,
        allow_nonfinite: bool = False,
    ):
        self.recipes, self.plans, self.threads, self.allow_nonfinite = recipes, plans, threads, allow_nonfinite
        self.engines = [
            Engine(r, p, sources, m, threads=threads, allow_nonfinite=allow_nonfinite, beside=b)
            for r, p, m, b in zip(recipes, plans, masks, besides, strict=True)
        ]
        self.by_name = [{t.name: t for t in plan} for plan in plans]
        self.ready: dict[str, list[Part]] = {}
        self.faults: dict[int, PetaFastError] = {}
        self._shared: dict[tuple, Shared] = {}
        self._grams: dict[tuple, object] = {}
        self._whole = [is_whole_tensor(r) for r in recipes]
        self._grammed = [wants_gram(r) for r in recipes]

    @property
    def alive(self) -> list[int]:
        return [v for v in range(len(self.recipes)) if v not in self.faults]

    def is_of_inputs(self, v: int) -> bool:
        """Whether a variant's fault is one of the inputs, and so of all variants; else its own result overflows."""
        return self.faults[v].who not in self.by_name[v]

    # What must be known of the whole model

    def find_model_statistics(self) -> None:
        """Thresholds and majority signs over the whole model, for the variants that want them; see Engine."""
        wanting = [v for v in self.alive if any(t.size and t.costs.model_readings for t in self.plans[v])]
        self._find_grams([v for v in wanting if wants_model_gram(self.recipes[v])])
        groups: dict[tuple, list[int]] = {}
        for v in wanting:
            if not wants_model_gram(self.recipes[v]):
                groups.setdefault(tuple(t.models for t in self._merged(v)), []).append(v)
        for variants in groups.values():
            self._find_thresholds(variants)
            self._find_majorities(variants)

    def _find_grams(self, variants: list[int]) -> None:
        """Inner products over the model: one reading for all variants of the same base and models."""
        found: dict[tuple, Engine] = {}
        for v in variants:
            first = found.setdefault(tuple((t.base, t.models) for t in self._merged(v)), self.engines[v])
            if first is self.engines[v]:
                first.find_model_statistics()
            self.engines[v].gram = first.gram

    def _merged(self, v: int) -> list[TensorPlan]:
        return [t for t in self.plans[v] if t.action == "merge" and t.size]

    def _spec_over_model(self, v: int) -> DeltaMerge:
        return spec_of(self.recipes[v], self._merged(v)[0], self.engines[v].total)

    def _find_thresholds(self, variants: list[int]) -> None:
        """Over models that are the same for all these variants: two readings for all counts of all variants."""
        specs = {v: self._spec_over_model(v) for v in variants}
        specs = {v: spec for v, spec in specs.items() if spec.needs_model_thresholds}
        if not specs:
            return
        wanted = {v: [ranks_wanted(term.keep) for term in spec.terms] for v, spec in specs.items()}
        first = next(iter(specs))
        histograms = [MagnitudeHistogram() for _ in wanted[first]]
        for second in (False, True):
            for tensor in self._merged(first):
                inputs = self.engines[first].inputs(tensor)
                for t, histogram in enumerate(histograms):
                    histogram.add(inputs.base, inputs.models[t], threads=self.threads)
            if not second:
                for t, histogram in enumerate(histograms):
                    histogram.narrow([k for counts in wanted.values() for k in counts[t]])
        for v, counts in wanted.items():
            self.engines[v].model_ranks = [h.thresholds(c) for h, c in zip(histograms, counts, strict=True)]

    def _find_majorities(self, variants: list[int]) -> None:
        found: dict[tuple, int] = {}
        for v in variants:
            spec, engine = self._spec_over_model(v), self.engines[v]
            if not spec.needs_model_signs:
                continue
            if spec.terms not in found:
                total = 0
                for tensor in self._merged(v):
                    own = [(spec_of(self.recipes[v], tensor, engine.total), engine.inputs(tensor))]
                    prepared = prepare(
                        own, seed=self.recipes[v].seed, model_ranks=engine.model_ranks, threads=self.threads
                    )
                    total += sign_total([with_majority(p, 0) for p in prepared], threads=self.threads)
                found[spec.terms] = (total > 0) - (total < 0)
            engine.majority = found[spec.terms]

    # What tensors need

    def get_ready(self, names: Sequence[str]) -> None:
        """Finds thresholds, norms and random streams of these tensors for all variants, where it is not done."""
        parts: list[tuple[str, tuple[int, ...], Shared, Inputs]] = []
        for name in names:
            if name not in self.ready:
                self.ready[name] = []
                parts.extend((name, *found) for found in self._parts_of(name))
        over_model = [p for p in parts if self._ranks_of(p[1], p[2])]
        plain = [p for p in parts if not self._ranks_of(p[1], p[2])]
        made = prepare([(shared.union, inputs) for _, _, shared, inputs in plain], threads=self.threads)
        for name, variants, shared, inputs in over_model:
            plain.append((name, variants, shared, inputs))
            ranks = self._ranks_of(variants, shared)
            made += prepare([(shared.union, inputs)], model_ranks=ranks, threads=self.threads)
        for (name, variants, shared, _), prepared in zip(plain, made, strict=True):
            self.ready[name].append(Part(variants, shared, prepared))

    def _ranks_of(self, variants: tuple[int, ...], shared: Shared):
        """By distinct term, the ranks that are known of the whole model; None where they are not asked for."""
        if not shared.union.needs_model_thresholds:
            return None
        known = [(self.engines[variants[v]].model_ranks, t) for v, t in shared.origins]
        return [ranks[t] if ranks is not None else [] for ranks, t in known]

    def _parts_of(self, name: str):
        """The variants whose merges of a tensor can share a pass, the Shared of each such set, and its inputs."""
        sets: dict[tuple, list[tuple[int, DeltaMerge]]] = {}
        known: dict[tuple, Inputs] = {}
        for v in self.alive:
            tensor = self.by_name[v].get(name)
            if tensor is None or tensor.action != "merge" or not tensor.size or self._whole[v]:
                continue
            (inputs,) = self._inputs((v,), name, known)
            if any(model.dtype not in MERGEABLE for model in inputs.models):
                continue  # in another form than elements: its own merge knows how to read it
            spec = self._spec(v, tensor)
            sets.setdefault((tensor.base if spec.base == "tensor" else None, *kind_of(spec)), []).append((v, spec))
        for members in sets.values():
            variants = tuple(v for v, _ in members)
            each = self._inputs(variants, name, known)
            patterns = self._patterns(variants, name)
            majorities = tuple(self.engines[v].majority for v in variants)
            seeds = tuple(self.recipes[v].seed for v in variants)
            key = (tuple(id(spec) for _, spec in members), patterns, majorities, seeds)
            shared = self._shared.get(key)
            if shared is None:  # it holds the specs, so that their ids stay theirs
                shared = self._shared[key] = share([spec for _, spec in members], patterns, seeds, majorities)
            yield variants, shared, shared.inputs(each, seeds)

    def _spec(self, v: int, tensor: TensorPlan) -> DeltaMerge:
        engine = self.engines[v]
        if not self._grammed[v]:
            return spec_of(self.recipes[v], tensor, engine.total, engine.gram)
        key = tensor.name, tensor.models
        if key not in self._grams:
            models = engine.inputs(tensor).models
            self._grams[key] = task_statistics(None, models, base_kind=BASE_ZERO, threads=self.threads).gram
        return spec_of(self.recipes[v], tensor, engine.total, self._grams[key])

    def _inputs(self, variants: tuple[int, ...], name: str, known: dict[tuple, Inputs]) -> list[Inputs]:
        each = []
        for v in variants:
            tensor = self.by_name[v][name]
            key = tensor.base, tensor.models, id(self.engines[v].masks)
            if key not in known:
                known[key] = self.engines[v].inputs(tensor)
            each.append(known[key])
        return each

    def _patterns(self, variants: tuple[int, ...], name: str) -> tuple[tuple[Hashable, ...], ...]:
        """By variant and task, numbers that tell model and mask apart; the same for tensors with the same models."""
        numbers: dict[Hashable, int] = {}
        patterns = []
        for v in variants:
            tensor, masks = self.by_name[v][name], self.engines[v].masks
            places = [
                (place, None if masks is None else (id(masks), mask_name(masks, name, t)))
                for t, place in enumerate(tensor.models)
            ]
            patterns.append(tuple(numbers.setdefault(place, len(numbers)) for place in places))
        return tuple(patterns)

    # Making them

    def fill(self, targets: Sequence[Targets]) -> None:
        """Makes the targets. A variant whose input or result is NaN or infinite gets a fault and is left out."""
        self.get_ready([t.name for t in targets])
        jobs: list[VariantJob] = []
        alone: dict[int, list[Piece]] = {}
        for target in targets:
            left = {v for v in target.buffers if v not in self.faults}
            for part in self.ready[target.name]:
                places = [k for k, v in enumerate(part.variants) if v in left]
                left.difference_update(part.variants)
                if places:
                    jobs.append(self._job(target, part, places))
            for v in left:
                tensor = self.by_name[v][target.name]
                alone.setdefault(v, []).append(Piece(tensor, target.start, target.stop, target.buffers[v]))
        self._run(jobs, [self._variants_of(job) for job in jobs])
        for v, pieces in alone.items():
            try:
                self.engines[v].fill(pieces)
                self.engines[v].forget({p.tensor.name for p in pieces if p.stop < p.tensor.nbytes})
            except PetaFastError as error:
                self.faults[v] = error

    def _job(self, target: Targets, part: Part, places: list[int]) -> VariantJob:
        tensors = [self.by_name[part.variants[k]][target.name] for k in places]
        width = ITEMSIZE[tensors[0].dtype]
        start, stop = target.start // width, target.stop // width
        buffers = [target.buffers[part.variants[k]] for k in places]
        outs = [Buffer(b.address, t.dtype, stop - start, b.owner) for b, t in zip(buffers, tensors, strict=True)]
        return VariantJob(part.shared, part.prepared, start, stop, places, outs)

    def _variants_of(self, job: VariantJob) -> list[int]:
        part = next(p for p in self.ready[job.prepared.inputs.name] if p.shared is job.shared)
        return [part.variants[k] for k in job.chosen]

    def _run(self, jobs: list[VariantJob], variants: list[list[int]]) -> None:
        if jobs and all(len(job.chosen) == 1 for job in jobs):
            return self._run_one(jobs, variants)
        for job, mine, flags in zip(jobs, variants, merge_variants(jobs, threads=self.threads), strict=True):
            for k, v, flag in zip(job.chosen, mine, flags, strict=True):
                if flag and not self.allow_nonfinite and v not in self.faults:
                    prepared = job.shared.of_variant(job.prepared, k)
                    self._give_up(v, lambda p=prepared, j=job, f=flag: refuse_nonfinite(p, j.start, j.stop, int(f)))

    def _run_one(self, jobs: list[VariantJob], variants: list[list[int]]) -> None:
        """A variant by itself shares nothing, and the loop for one merge is faster then."""
        made = [
            Job(job.shared.of_variant(job.prepared, job.chosen[0]), job.start, job.stop, job.outs[0]) for job in jobs
        ]
        by_variant: dict[int, list[Job]] = {}
        for job, (v,) in zip(made, variants, strict=True):
            by_variant.setdefault(v, []).append(job)
        for v, mine in by_variant.items():
            self._give_up(v, lambda m=mine: merge(m, threads=self.threads, allow_nonfinite=self.allow_nonfinite))

    def _give_up(self, v: int, raising) -> None:
        try:
            raising()
        except PetaFastError as error:
            self.faults[v] = error

    def forget(self, kept: set[str] = frozenset()) -> None:
        """Lets go of what tensors needed, except for those named."""
        self.ready = {name: parts for name, parts in self.ready.items() if name in kept}


def selections_of(plans: Sequence[Sequence[TensorPlan]]) -> int:
    """About how many exact selections over one tensor the variants ask for together."""
    found: dict[tuple, int] = {}
    for plan in plans:
        largest = max((t for t in plan if t.action == "merge"), key=lambda t: t.size, default=None)
        if largest is not None:
            found[largest.models, getattr(largest.params, "density", None)] = largest.costs.selections
    return sum(found.values())
