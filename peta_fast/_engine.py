"""Merges tensors of a recipe, out of files or memory, with what must be known of the whole model first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from peta_fast import methods
from peta_fast._assignment import Source
from peta_fast._tensor_plan import (
    TensorPlan,
    is_whole_tensor,
    mask_form,
    mask_name,
    spec_of,
    tensor_info,
    wants_gram,
)
from peta_fast.buffers import ITEMSIZE, LONG_NAMES, Buffer, FactorsBuffer
from peta_fast.errors import CheckpointError
from peta_fast.methods import TensorSpec
from peta_fast.ops import backend
from peta_fast.ops.delta_merge import (
    DeltaMerge,
    Inputs,
    Job,
    MaskBuffer,
    Prepared,
    Term,
    merge,
    prepare,
    ranks_wanted,
    sign_total,
    with_majority,
)
from peta_fast.ops.factors import formed
from peta_fast.ops.order_statistics import MagnitudeHistogram, Rank
from peta_fast.ops.records import BASE_ZERO
from peta_fast.ops.task_statistics import task_statistics
from peta_fast.plan import merged_size
from peta_fast.recipe import ModelRef, Recipe


@dataclass(frozen=True)
class Piece:
    """Bytes [start, stop) of a tensor's output, and where they go."""

    tensor: TensorPlan
    start: int
    stop: int
    target: Buffer


class Engine:
    """Makes outputs of tensors, wholly or piece by piece.

    tensors   all of the recipe
    ready     by name, what the pieces of a tensor need: thresholds and norms, or its whole result. It is found with
              the first piece; whoever has had the last one calls `forget`.
    """

    def __init__(
        self,
        recipe: Recipe,
        tensors: Sequence[TensorPlan],
        sources: Mapping[ModelRef, Source],
        masks: Source | None,
        *,
        threads: int = 0,
        allow_nonfinite: bool = False,
    ):
        self.recipe, self.tensors, self.sources, self.masks = recipe, tensors, sources, masks
        self.threads, self.allow_nonfinite = threads, allow_nonfinite
        self.total = merged_size(tensors)
        self.model_ranks: list[list[Rank]] | None = None
        self.majority = 0
        self.ready: dict[str, Prepared | Buffer] = {}

    def find_model_statistics(self, tell: Callable[[TensorPlan], None] = lambda tensor: None) -> None:
        """Thresholds and majority sign over the whole model, where the method wants them. tell: after each reading."""
        wanting = [t for t in self.tensors if t.size and t.costs.model_readings]
        if not wanting:
            return
        merged = [t for t in self.tensors if t.action == "merge" and t.size]
        specs = [spec_of(self.recipe, t, self.total) for t in merged]
        if specs[0].needs_model_thresholds:
            self._find_thresholds(merged, specs[0], tell)
        if specs[0].needs_model_signs:
            total = 0
            for tensor, spec in zip(merged, specs, strict=True):
                total += sign_total(self._prepare([(tensor, spec)]), threads=self.threads)
                tell(tensor)
            self.majority = (total > 0) - (total < 0)

    def _find_thresholds(self, merged: list[TensorPlan], spec: DeltaMerge, tell) -> None:
        counts = [ranks_wanted(term.keep) for term in spec.terms]
        histograms = [MagnitudeHistogram() for _ in counts]
        for second in (False, True):
            for tensor in merged:
                inputs = self.inputs(tensor)
                for t, histogram in enumerate(histograms):
                    histogram.add(inputs.base, inputs.models[t], threads=self.threads)
                tell(tensor)
            if not second:
                for histogram, wanted in zip(histograms, counts, strict=True):
                    histogram.narrow(wanted)
        self.model_ranks = [h.thresholds(c) for h, c in zip(histograms, counts, strict=True)]

    def inputs(self, tensor: TensorPlan) -> Inputs:
        base = self._buffer(tensor.base) if tensor.base else None
        models = tuple(self._model(tensor, place) for place in tensor.models)
        labels = tuple(self._label(place, tensor.name) for place in tensor.inputs)
        masks = self._masks(tensor) if self.masks is not None and tensor.action == "merge" else ()
        return Inputs(tensor.name, tensor.shape, base, models, masks, labels)

    def _buffer(self, place: tuple[ModelRef, str]) -> Buffer:
        return self.sources[place[0]].buffer(place[1])

    def _model(self, tensor: TensorPlan, place: tuple[ModelRef, str]) -> Buffer:
        """A model's tensor; only its change, where that is what an adapter makes of the tensor's base."""
        source = self.sources[place[0]]
        change = None
        if tensor.base and tensor.action == "merge" and not is_whole_tensor(self.recipe) and hasattr(source, "change"):
            change = source.change(place[1], self.sources[tensor.base[0]], tensor.base[1])
        return self._buffer(place) if change is None else change

    def _label(self, place: tuple[ModelRef, str], name: str) -> str:
        """The file of an input and, where the output has another name, the tensor's there."""
        who = str(getattr(tensor_info(self.sources, place), "file", place[0]))
        return who if place[1] == name else f"{who}: {place[1]!r} for"

    def _masks(self, tensor: TensorPlan) -> tuple[MaskBuffer, ...]:
        names = [mask_name(self.masks, tensor.name, t) for t in range(len(tensor.models))]
        return tuple(MaskBuffer(self.masks.buffer(n), mask_form(self.masks.tensors[n], tensor.shape)) for n in names)

    def _spec(self, tensor: TensorPlan) -> DeltaMerge:
        if tensor.action == "average":
            count = len(tensor.models)
            return DeltaMerge(tuple(Term() for _ in range(count)), base="zero", divide=float(count))
        if not wants_gram(self.recipe):
            return spec_of(self.recipe, tensor, self.total)
        models = [self._buffer(m) for m in tensor.models]
        gram = task_statistics(None, models, base_kind=BASE_ZERO, threads=self.threads).gram
        return spec_of(self.recipe, tensor, self.total, gram)

    def _prepare(self, chosen) -> list[Prepared]:
        found = prepare(
            [(spec, self.inputs(tensor)) for tensor, spec in chosen],
            seed=self.recipe.seed,
            majority=self.majority,
            model_ranks=self.model_ranks,
            threads=self.threads,
        )
        return [with_majority(p, self.majority) for p in found]

    def get_ready(self, tensors: list[TensorPlan]) -> None:
        """Finds what the merges of these tensors need, for all that are not ready; copies need nothing."""
        fresh = [t for t in tensors if t.name not in self.ready and t.action != "copy" and t.size]
        whole = [t for t in fresh if t.action == "merge" and is_whole_tensor(self.recipe)]
        for tensor in whole:
            self.ready[tensor.name] = self._merge_whole(tensor)
        rest = [t for t in fresh if t.name not in self.ready]
        for tensor, prepared in zip(rest, self._prepare([(t, self._spec(t)) for t in rest]), strict=True):
            self.ready[tensor.name] = prepared

    def fill(self, pieces: list[Piece]) -> None:
        """Makes the pieces. Raises CheckpointError when an input or a result is NaN or infinite, unless allowed."""
        self.get_ready([p.tensor for p in pieces])
        jobs = []
        for piece in pieces:
            tensor, width = piece.tensor, ITEMSIZE[piece.tensor.dtype]
            ready = self.ready.get(tensor.name)
            if isinstance(ready, Prepared):
                start, stop = piece.start // width, piece.stop // width
                out = Buffer(piece.target.address, tensor.dtype, stop - start, piece.target.owner)
                jobs.append(Job(ready, start, stop, out))
            elif piece.stop > piece.start:
                self._copy(ready or self._buffer(tensor.models[0]), piece)
        merge(jobs, threads=self.threads, allow_nonfinite=self.allow_nonfinite)

    def forget(self, kept: set[str] = frozenset()) -> None:
        """Lets go of what tensors needed, except for those named."""
        self.ready = {name: ready for name, ready in self.ready.items() if name in kept}

    def _copy(self, source: Buffer, piece: Piece) -> None:
        if source.address + piece.start != piece.target.address:
            count = piece.stop - piece.start
            backend().copy_bytes(piece.target.address, source.address + piece.start, count, self.threads)

    def _merge_whole(self, tensor: TensorPlan) -> Buffer:
        """Runs a method that is plain PyTorch over one tensor; its result in the output's dtype."""
        inputs = self.inputs(tensor)
        if not self.allow_nonfinite:
            _refuse_nonfinite(inputs, self.threads)
        merged = run_whole_tensor(self.recipe, tensor, inputs)
        if not self.allow_nonfinite and not merged.isfinite().all():
            raise CheckpointError(tensor.name, f"the merged values are not finite in {LONG_NAMES[tensor.dtype]}", HINT)
        merged[merged.isnan()] = float("nan")  # one pattern
        return Buffer(merged.data_ptr(), tensor.dtype, merged.numel(), merged)


HINT = "Mend that checkpoint, or allow NaN and inf with allow_nonfinite (--allow-nonfinite)."


def _refuse_nonfinite(inputs: Inputs, threads: int) -> None:
    buffers = ([inputs.base] if inputs.base is not None else []) + list(inputs.models)
    for label, buffer in zip(inputs.labels, buffers, strict=True):
        count = int(task_statistics(None, [buffer], base_kind=BASE_ZERO, threads=threads).nonfinite[0])
        if count:
            raise CheckpointError(label, f"{inputs.name!r}: expected finite values, got {count} NaN or inf", HINT)


def run_whole_tensor(recipe: Recipe, tensor: TensorPlan, inputs: Inputs):
    """The torch tensor that a whole-tensor method makes, in the output's dtype, contiguous, nobody else's memory.

    Raises ValueError when it has another shape than its inputs.
    """
    import torch

    def as_tensor(buffer: Buffer):
        if isinstance(buffer, FactorsBuffer):
            return torch.from_numpy(formed(buffer)).reshape(tensor.shape)
        raw = np.array(np.frombuffer(buffer.as_bytes(), np.uint8))
        return torch.from_numpy(raw).view(getattr(torch, LONG_NAMES[buffer.dtype])).reshape(tensor.shape)

    spec = TensorSpec(tensor.name, tensor.shape, len(tensor.models), recipe.compat, "tensor", tensor.size)
    base = as_tensor(inputs.base) if inputs.base is not None else None
    merged = methods.get(recipe.method).merge(base, [as_tensor(m) for m in inputs.models], tensor.params, spec)
    if tuple(merged.shape) != tuple(tensor.shape):
        raise ValueError(f"{recipe.method}: {tensor.name} came out as {list(merged.shape)}, not {list(tensor.shape)}")
    return merged.detach().to(getattr(torch, LONG_NAMES[tensor.dtype])).contiguous()
