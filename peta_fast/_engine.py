"""Merges tensors of a recipe, out of files or memory, with what must be known of the whole model first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from peta_fast import methods
from peta_fast._assignment import Source
from peta_fast._beside import Beside
from peta_fast._tensor_plan import (
    TensorPlan,
    is_whole_tensor,
    mask_form,
    mask_name,
    spec_of,
    tensor_info,
    wants_gram,
    wants_model_gram,
)
from peta_fast.buffers import ITEMSIZE, LONG_NAMES, Buffer, FactorsBuffer
from peta_fast.errors import CheckpointError
from peta_fast.methods import TensorSpec, TensorStatistics
from peta_fast.ops import backend
from peta_fast.ops.delta_merge import (
    DeltaMerge,
    Inputs,
    Job,
    MaskBuffer,
    Prepared,
    Term,
    Verdict,
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
    notes     by name, what a whole-tensor method had to say of a tensor
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
        beside: Beside | None = None,
    ):
        self.recipe, self.tensors, self.sources, self.masks = recipe, tensors, sources, masks
        self.beside = beside
        self.notes: dict[str, dict] = {}
        self.threads, self.allow_nonfinite = threads, allow_nonfinite
        self.total = merged_size(tensors)
        self.model_ranks: list[list[Rank]] | None = None
        self.majority = 0
        self.gram: np.ndarray | None = None
        self.ready: dict[str, Prepared | Buffer] = {}
        self.verdicts: list[Verdict] = []  # of devices that have not been waited for

    def find_model_statistics(self, tell: Callable[[TensorPlan], None] = lambda tensor: None) -> None:
        """Thresholds, majority sign or inner products over the whole model, where the method wants them.

        tell  is called after each reading
        """
        wanting = [t for t in self.tensors if t.size and t.costs.model_readings]
        if not wanting:
            return
        merged = [t for t in self.tensors if t.action == "merge" and t.size]
        if wants_model_gram(self.recipe):
            self._find_gram(merged, tell)
            return
        specs = [spec_of(self.recipe, t, self.total) for t in merged]
        if specs[0].needs_model_thresholds:
            self._find_thresholds(merged, specs[0], tell)
        if specs[0].needs_model_signs:
            total = 0
            for tensor, spec in zip(merged, specs, strict=True):
                total += sign_total(self._prepare([(tensor, spec)]), threads=self.threads)
                tell(tensor)
            self.majority = (total > 0) - (total < 0)

    def _find_gram(self, merged: list[TensorPlan], tell) -> None:
        """Raises CheckpointError for NaN and inf, even where they are allowed: no angle is left among such vectors."""
        self.gram = np.zeros((len(merged[0].models),) * 2)
        for tensor in merged:
            inputs = self.inputs(tensor)
            found = task_statistics(inputs.base, inputs.models, threads=self.threads)
            if found.nonfinite.any():
                _refuse_nonfinite(inputs, self.threads)
                raise CheckpointError(tensor.name, "differences between models are not finite in fp32", HINT)
            self.gram += found.gram
            tell(tensor)

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
            weights = tensor.parameters.get("weight") or (1.0,) * len(tensor.models)
            return DeltaMerge(tuple(map(Term, weights)), base="zero", divide=float(sum(weights)))
        if not wants_gram(self.recipe):
            return spec_of(self.recipe, tensor, self.total, self.gram)
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
                target = piece.target
                out = Buffer(target.address, tensor.dtype, stop - start, target.owner, target.device)
                jobs.append(Job(ready, start, stop, out))
            elif piece.stop > piece.start:
                self._copy(ready or self._buffer(tensor.models[0]), piece)
        merge(jobs, threads=self.threads, allow_nonfinite=self.allow_nonfinite, later=self.verdicts)

    def finish(self) -> None:
        """Waits for devices. Raises CheckpointError when what they read or wrote is NaN or infinite, unless allowed."""
        verdicts, self.verdicts = self.verdicts, []
        for verdict in verdicts:
            verdict.check()

    def forget(self, kept: set[str] = frozenset()) -> None:
        """Lets go of what tensors needed, except for those named."""
        self.ready = {name: ready for name, ready in self.ready.items() if name in kept}

    def _copy(self, source: Buffer, piece: Piece) -> None:
        if source.address + piece.start != piece.target.address:
            count = piece.stop - piece.start
            backend(piece.target.device).copy_bytes(
                piece.target.address, source.address + piece.start, count, self.threads
            )

    def _merge_whole(self, tensor: TensorPlan) -> Buffer:
        """Runs a method that is plain PyTorch over one tensor; its result in the output's dtype."""
        inputs = self.inputs(tensor)
        if not self.allow_nonfinite:
            _refuse_nonfinite(inputs, self.threads)
        spec = self._whole_spec(tensor, inputs.device or "cpu")
        merged = run_whole_tensor(self.recipe, tensor, inputs, spec)
        if spec.notes:
            self.notes[tensor.name] = spec.notes
        if not self.allow_nonfinite and not merged.isfinite().all():
            raise CheckpointError(tensor.name, f"the merged values are not finite in {LONG_NAMES[tensor.dtype]}", HINT)
        merged[merged.isnan()] = float("nan")  # one pattern
        return Buffer(merged.data_ptr(), tensor.dtype, merged.numel(), merged, inputs.device)

    def _whole_spec(self, tensor: TensorPlan, device: str) -> TensorSpec:
        """What a whole-tensor method may know, with the tensor's statistics, which go to the device.

        Raises CheckpointError for NaN and inf.
        """
        known = tensor.name, tensor.shape, len(tensor.models), self.recipe.compat, "tensor", tensor.size
        if self.beside is None:
            return TensorSpec(*known)
        statistics = tuple(self._statistics(places, tensor, device) for places in tensor.beside.statistics)
        start = tensor.beside.start and self._read_beside(*tensor.beside.start, device).reshape(tensor.shape)
        return TensorSpec(*known, statistics=statistics, start=start)

    def _statistics(self, places: Mapping[str, tuple[str, str]], tensor: TensorPlan, device: str) -> TensorStatistics:
        file, key = next(iter(places.values()))
        found = {kind: self._read_beside(*place, device) for kind, place in places.items()}
        if "fisher" in found:
            found["fisher"] = found["fisher"].reshape(tensor.shape)
        module, norm = key.rpartition(".")[0], self.beside.fisher_norm(file)
        return TensorStatistics(
            **found,
            transposed=module in self.beside.transposed(file),
            fisher_norm=norm,
            collected=self.beside.metadata(file).get("collected", ""),
        )

    def _read_beside(self, file: str, name: str, device: str):
        """A flat torch tensor on the device, over the bytes as they lie where they lie there; not to be written to."""
        buffer = self.beside.source(file).buffer(name)
        if not self.allow_nonfinite:
            count = int(task_statistics(None, [buffer], base_kind=BASE_ZERO, threads=self.threads).nonfinite[0])
            if count:
                raise CheckpointError(file, f"{name!r}: expected finite values, got {count} NaN or inf", HINT)
        return as_torch(buffer, copied=False).to(device)


HINT = "Mend that checkpoint, or allow NaN and inf with allow_nonfinite (--allow-nonfinite)."


def _refuse_nonfinite(inputs: Inputs, threads: int) -> None:
    buffers = ([inputs.base] if inputs.base is not None else []) + list(inputs.models)
    for label, buffer in zip(inputs.labels, buffers, strict=True):
        count = int(task_statistics(None, [buffer], base_kind=BASE_ZERO, threads=threads).nonfinite[0])
        if count:
            raise CheckpointError(label, f"{inputs.name!r}: expected finite values, got {count} NaN or inf", HINT)


def as_torch(buffer: Buffer, *, copied: bool = True):
    """The elements as a flat torch tensor."""
    import torch

    if isinstance(buffer, FactorsBuffer):
        return torch.from_numpy(formed(buffer))
    if buffer.device.startswith("cuda"):
        from peta_fast.ops.device import device_bytes

        there = device_bytes(buffer.address, buffer.nbytes, buffer.device)
        return (there.clone() if copied else there).view(getattr(torch, LONG_NAMES[buffer.dtype]))
    raw = np.frombuffer(buffer.as_bytes(), np.uint8)
    return torch.from_numpy(np.array(raw) if copied else raw).view(getattr(torch, LONG_NAMES[buffer.dtype]))


def run_whole_tensor(recipe: Recipe, tensor: TensorPlan, inputs: Inputs, spec: TensorSpec):
    """The torch tensor that a whole-tensor method makes, in the output's dtype, contiguous, nobody else's memory.

    Raises ValueError when it has another shape than its inputs.
    """
    import torch

    base = as_torch(inputs.base).reshape(tensor.shape) if inputs.base is not None else None
    models = [as_torch(m).reshape(tensor.shape) for m in inputs.models]
    merged = methods.get(recipe.method).merge(base, models, tensor.params, spec)
    if tuple(merged.shape) != tuple(tensor.shape):
        raise ValueError(f"{recipe.method}: {tensor.name} came out as {list(merged.shape)}, not {list(tensor.shape)}")
    return merged.detach().to(getattr(torch, LONG_NAMES[tensor.dtype])).contiguous()
