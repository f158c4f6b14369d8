"""Variants of a sweep in memory: the tensors they go into, and how a few at a time are made, exactly each time."""

from __future__ import annotations

import dataclasses
import mmap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from peta_fast._beside import Beside
from peta_fast._grid import Grid
from peta_fast._tensor_plan import SELECTION_BYTES, TensorPlan, runs_of
from peta_fast._variants import Targets, VariantEngine, selections_of
from peta_fast.buffers import LONG_NAMES, Buffer
from peta_fast.errors import CheckpointError, PetaFastError, RecipeError
from peta_fast.merging import MemorySource, Place, places_in
from peta_fast.ops import backend
from peta_fast.plan import make_plan, open_masks, plan_tensors
from peta_fast.recipe import ModelRef, Recipe

WINDOW = 32
"""Points whose thresholds are found in one reading."""
TOGETHER = 3
"""Variants made in one pass over the inputs, where they differ in weights alone: with more, the memory that they want
for the first time costs more than there is left to be shared."""
BATCH = 1 << 24
"""Elements merged in one call."""


@dataclass(frozen=True)
class Variant:
    """One point of a sweep, merged.

    index       its place in the grid
    parameters  grid key -> value
    error       why it could not be merged: its result is not finite
    """

    index: int
    name: str
    parameters: Mapping[str, Any]
    recipe: Recipe
    error: PetaFastError | None
    held: Any = dataclasses.field(repr=False, default=None)

    @property
    def state(self) -> Any:
        """name -> tensor, until the next variant is asked for; the model or mapping that the sweep merges into."""
        if self.error is not None:
            raise self.error
        return self.held


class VariantMemory:
    """Where variants of a grid are held: the tensors they go into, and the sources they are made of.

    sources  state dicts by model, masks under None; None for models in files
    into     what takes each variant in place: a model, a dict of tensors, or None for memory of their own
    """

    def __init__(
        self,
        grid: Grid,
        sources: Mapping[ModelRef | None, MemorySource] | None,
        into: Any,
        max_memory: int,
        threads: int,
        allow_nonfinite: bool,
    ):
        self.grid, self.into, self.max_memory = grid, into, max_memory
        self.threads, self.allow_nonfinite = threads, allow_nonfinite
        self.masks_in_memory = None
        if sources is None:
            plan = make_plan(self.grid.recipe_of(0), max_memory=1 << 62)
            self.sources = dict(plan.sources)
        else:
            self.sources = {ref: source for ref, source in sources.items() if ref is not None}
            self.masks_in_memory = sources.get(None)
        self.target = _state_of(into)
        self.kept = self._keep_inputs_apart() if self.target is not None and sources is not None else None
        self.slots: list[_Slot] = []
        self.masks: dict[Any, Any] = {}

    def _keep_inputs_apart(self) -> Mapping[str, Any] | None:
        """Copies inputs that lie where variants are to go; what has to be put back in the end."""
        taken = [_span(value) for value in self.target.values() if hasattr(value, "dtype")]
        saved = None
        for ref, source in self.sources.items():
            mine = {n: v for n, v in source.state.items() if hasattr(v, "dtype") and _overlaps(_span(v), taken)}
            if mine:
                if saved is None:
                    saved = {n: _copy_of(v) for n, v in self.target.items() if hasattr(v, "dtype")}
                clones: dict[tuple, Any] = {}
                state = {n: clones.setdefault((_span(v), v.shape), _copy_of(v)) for n, v in mine.items()}
                self.sources[ref] = MemorySource(source.label, {**source.state, **state})
        return saved

    def close(self) -> None:
        if self.kept is not None:
            for name, value in self.kept.items():
                _put(self.target[name], value)
            self.kept = None

    def variants(self, window: list[int]) -> Iterator[Variant]:
        grid = self.grid
        recipes = [grid.recipe_of(index) for index in window]
        masks = [self._masks_of(recipe) for recipe in recipes]
        besides = [Beside() for _ in recipes]
        plans = [plan_tensors(r, self.sources, m, b) for r, m, b in zip(recipes, masks, besides, strict=True)]
        engine = VariantEngine(
            recipes, plans, self.sources, masks, besides, threads=self.threads, allow_nonfinite=self.allow_nonfinite
        )
        engine.find_model_statistics()
        for group in self._groups(len(window), plans[0]):
            places = self._places(group, plans[0])
            self._fill(engine, plans, group, places)
            for v in group:
                if v in engine.faults and engine.is_of_inputs(v):
                    raise engine.faults[v]
            for v in group:
                index, error = window[v], engine.faults.get(v)
                held = None if error else self._hand_out(v, group, places)
                yield Variant(index, grid.name(index), grid.point(index), recipes[v], error, held)

    def _masks_of(self, recipe: Recipe):
        if self.masks_in_memory is not None:
            return self.masks_in_memory
        module = recipe.modules[0]
        key = recipe.resolve("", module, module.slices[0], None).get("mask")
        if key not in self.masks:
            self.masks[key] = open_masks(recipe)
        return self.masks[key]

    def most_points(self) -> int:
        """How many points may have their thresholds found together: it takes memory for each, of the largest tensor."""
        recipe = self.grid.recipe_of(0)
        plan = plan_tensors(recipe, self.sources, self._masks_of(recipe))
        each = max((SELECTION_BYTES * t.size * t.costs.selections for t in plan), default=0)
        return max(1, min(WINDOW, int(self.max_memory / 4 / max(1, each))))

    # Where variants go

    @property
    def direct(self) -> bool:
        """Whether variants are merged right into the target."""
        return self.target is not None and all(
            isinstance(v, np.ndarray) or (v.device.type == "cpu" and v.is_contiguous())
            for v in self.target.values()
            if hasattr(v, "dtype")
        )

    def _groups(self, count: int, plan: Sequence[TensorPlan]) -> Iterator[list[int]]:
        """Runs of variants that are made in one pass."""
        size = 1
        if not self.direct:
            fits = max(1, self.max_memory // max(1, sum(t.nbytes for t in plan if t.action != "alias")))
            block = min(self.grid.block(), count)
            most = min(TOGETHER, fits)
            size = -(-block // -(-block // most)) if block > 1 else min(most, 4)
        for start in range(0, count, size):
            yield list(range(start, min(start + size, count)))

    def _places(self, group: list[int], plan: Sequence[TensorPlan]) -> list[Mapping[str, Place]]:
        if self.direct:
            return [places_in(plan, self.target)]
        as_numpy = self._as_numpy()
        while len(self.slots) < len(group):
            self.slots.append(_Slot(plan, as_numpy))
        return [self.slots[k].places for k in range(len(group))]

    def _as_numpy(self) -> bool:
        """Whether variants are numpy arrays: those of state dicts that are."""
        first = next(iter(self.sources.values()))
        values = [v for v in getattr(first, "state", {}).values() if hasattr(v, "dtype")]
        return bool(values) and isinstance(values[0], np.ndarray)

    def _fill(self, engine: VariantEngine, plans, group: list[int], places) -> None:
        limit = max(1, 3 * BATCH // max(3, selections_of(plans)))
        for batch in runs_of(plans[0], limit):
            targets = []
            for tensor in batch:
                buffers = {v: place[tensor.name].buffer for v, place in zip(group, places, strict=True)}
                raw = {v: Buffer(b.address, "U8", b.nbytes, b.owner) for v, b in buffers.items()}
                targets.append(Targets(tensor.name, 0, tensor.nbytes, raw))
            engine.fill(targets)
        for alias in (t for t in plans[0] if t.action == "alias"):
            for place in places:
                source, target = place[_stored(alias)].buffer, place[alias.name].buffer
                if source.address != target.address:
                    backend().copy_bytes(target.address, source.address, source.nbytes, self.threads)

    def _hand_out(self, v: int, group: list[int], places) -> Any:
        if self.direct:
            return self.into
        values = {name: place.value for name, place in places[group.index(v)].items()}
        if self.target is None:
            return values
        for name, value in values.items():
            if name not in self.target:
                raise CheckpointError("into", f"lacks {name!r}")
            _put(self.target[name], value)
        return self.into


def _stored(alias: TensorPlan) -> str:
    """The name that a tied tensor is stored under."""
    return alias.reason.removeprefix("tied to ")


class _Slot:
    """Memory of one variant, in one run with large pages, handed out again and again."""

    def __init__(self, plan: Sequence[TensorPlan], as_numpy: bool):
        offsets, end = {}, 0
        for tensor in plan:
            if tensor.action != "alias":
                offsets[tensor.name] = end
                end += -(-tensor.nbytes // 64) * 64
        self.memory = mmap.mmap(-1, max(end, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self.memory.madvise(mmap.MADV_HUGEPAGE)
        whole = np.frombuffer(self.memory, np.uint8)
        self.places: dict[str, Place] = {}
        for tensor in plan:
            if tensor.action == "alias":
                self.places[tensor.name] = self.places[_stored(tensor)]
                continue
            start = offsets[tensor.name]
            raw = whole[start : start + tensor.nbytes]
            value = _viewed(raw, tensor, as_numpy)
            buffer = Buffer(whole.ctypes.data + start, tensor.dtype, tensor.size, whole)
            self.places[tensor.name] = Place(value, buffer)


def _viewed(raw: np.ndarray, tensor: TensorPlan, as_numpy: bool) -> Any:
    name = LONG_NAMES[tensor.dtype]
    if as_numpy:
        return raw.view(name).reshape(tensor.shape)
    import torch

    dtype = getattr(torch, name)
    if not raw.size:
        return torch.empty(tensor.shape, dtype=dtype)
    return torch.frombuffer(raw, dtype=torch.uint8).view(dtype).reshape(tensor.shape)


def _state_of(into: Any) -> Mapping[str, Any] | None:
    if into is None or isinstance(into, Mapping):
        return into
    if not hasattr(into, "state_dict"):
        raise RecipeError("into", f"expected a model or a dict of tensors, got a {type(into).__name__}")
    return into.state_dict()


def _span(value: Any) -> tuple[int, int]:
    """First and last address of what a tensor lies in; of strided ones, of all their storage."""
    if isinstance(value, np.ndarray):
        start = value.__array_interface__["data"][0]
        reach = [(n - 1) * step for n, step in zip(value.shape, value.strides, strict=True)] if value.size else []
        low, high = sum(r for r in reach if r < 0), sum(r for r in reach if r > 0)
        return start + low, start + high + (value.itemsize if value.size else 0)
    storage = value.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()


def _overlaps(span: tuple[int, int], others: Sequence[tuple[int, int]]) -> bool:
    return any(span[0] < end and start < span[1] for start, end in others)


def _copy_of(value: Any) -> Any:
    return value.copy() if isinstance(value, np.ndarray) else value.detach().clone()


def _put(target: Any, value: Any) -> None:
    """Copies a tensor's values in place."""
    if isinstance(target, np.ndarray):
        np.copyto(target, value)
        return
    import torch

    if tuple(target.shape) != tuple(value.shape) or target.dtype != value.dtype:
        raise CheckpointError(
            "into", f"is {target.dtype} {list(target.shape)} where {value.dtype} {list(value.shape)} comes out"
        )
    with torch.no_grad():
        target.copy_(value)
