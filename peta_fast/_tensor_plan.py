"""What happens to one tensor, the fused merge that its settings stand for, and what that costs."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from peta_fast import methods
from peta_fast._assignment import Source
from peta_fast._beside import BesidePlaces
from peta_fast.buffers import ITEMSIZE, LONG_NAMES, MERGEABLE
from peta_fast.methods import TensorSpec
from peta_fast.ops.delta_merge import NORM_TILE, All, Band, DeltaMerge, Nothing, RankedRandom, Top, trim_size
from peta_fast.recipe import ModelRef, Recipe

SELECTION_BYTES = 0.12
"""Bytes an element and task that an exact selection keeps: about 2 % of the magnitudes, and block counts."""
PROBABILITY_BYTES = 5
"""Bytes an element and task of keep probabilities by rank: fp32, and what ranking a row takes."""


@dataclass(frozen=True, slots=True)
class Costs:
    """What merging a tensor with certain settings takes, whatever its size.

    model_readings  of its inputs before any merging, for what must be known of the whole model
    readings        of its inputs when it is merged
    selections      tasks whose magnitudes are ranked within the tensor
    rows            tasks whose rows are ranked
    normed          whether norms are restored
    whole           whether it is loaded as a whole
    """

    model_readings: int = 0
    readings: int = 1
    selections: int = 0
    rows: int = 0
    normed: bool = False
    whole: bool = False

    def memory(self, tensor: TensorPlan, slab: int, together: int) -> int:
        """Bytes of working memory that merging a tensor takes beside the slabs.

        together  elements of tensors that are got ready in one call
        """
        if self.whole:
            return tensor.size * 4 * (len(tensor.inputs) + 2) + tensor.solving_bytes
        row = tensor.shape[-1] if len(tensor.shape) > 1 else tensor.size
        in_slab = slab // ITEMSIZE[tensor.dtype]  # of this tensor, or of others that the slab holds beside it
        probabilities = max(in_slab, NORM_TILE if self.normed and tensor.size > in_slab else 0) + 2 * row
        selected = max(tensor.size + in_slab, together)
        return int(SELECTION_BYTES * selected * self.selections + PROBABILITY_BYTES * probabilities * self.rows)


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """What happens to one output tensor.

    action      merge, copy, average, or alias: another name of a tensor that is stored, in `reason`
    dtype       of the output, a safetensors name
    base, models  (model, tensor name there)
    parameters  the method's keys, resolved for this tensor
    reason      why, where it is not a plain merge
    costs       what merging it takes
    input_bytes of one reading of its inputs
    beside      where its statistics lie, and what a solver begins from
    solving_bytes  of working memory that a whole-tensor method takes beside the inputs
    factor_bytes   of working memory that the low-rank factors of its inputs take
    """

    name: str
    action: str
    dtype: str
    shape: tuple[int, ...]
    base: tuple[ModelRef, str] | None
    models: tuple[tuple[ModelRef, str], ...]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    params: Any = None
    reason: str = ""
    costs: Costs = Costs()
    input_bytes: int = 0
    beside: BesidePlaces = BesidePlaces()
    solving_bytes: int = 0
    factor_bytes: int = 0

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Of the output."""
        return math.prod(self.shape) * ITEMSIZE[self.dtype]

    @property
    def bytes_read(self) -> int:
        """Of the inputs, each reading counted."""
        return self.input_bytes * (self.costs.model_readings + self.costs.readings)

    @property
    def inputs(self) -> tuple[tuple[ModelRef, str], ...]:
        return ((self.base,) if self.base else ()) + self.models

    def to_json(self) -> dict[str, Any]:
        def label(place):
            return f"{place[0]}:{place[1]}"

        return {
            "name": self.name,
            "action": self.action,
            "dtype": LONG_NAMES[self.dtype],
            "shape": list(self.shape),
            "base": label(self.base) if self.base else None,
            "models": [label(m) for m in self.models],
            "parameters": dict(self.parameters),
            "reason": self.reason,
        }


@functools.lru_cache(maxsize=4096)
def lowered(
    method: str, params, shape: tuple[int, ...], models: int, compat: str, scope: str, total: int
) -> DeltaMerge:
    """The element-wise merge of every tensor with these settings and this shape; `total` counts for scope "model"."""
    module = methods.get(method)
    scope = getattr(module, "SCOPE", {}).get(compat, scope)
    size = total if scope == "model" else trim_size(shape, scope)
    return module.lower(params, TensorSpec("", shape, models, compat, scope, size))


def spec_of(recipe: Recipe, tensor: TensorPlan, total: int, gram=None) -> DeltaMerge:
    """A tensor's merge, with its inner products where the method asks for them."""
    if gram is None:
        return lowered(
            recipe.method, tensor.params, tensor.shape, len(tensor.models), recipe.compat, recipe.trim_scope, total
        )
    module = methods.get(recipe.method)
    spec = TensorSpec(tensor.name, tensor.shape, len(tensor.models), recipe.compat, "tensor", tensor.size, gram)
    return module.lower(tensor.params, spec)


def wants_gram(recipe: Recipe) -> bool:
    return "gram" in getattr(methods.get(recipe.method), "STATISTICS", ())


def wants_model_gram(recipe: Recipe) -> bool:
    return "model-gram" in getattr(methods.get(recipe.method), "STATISTICS", ())


def is_whole_tensor(recipe: Recipe) -> bool:
    """Whether the method is plain PyTorch over whole tensors."""
    return not hasattr(methods.get(recipe.method), "lower")


def is_masked(recipe: Recipe) -> bool:
    return getattr(methods.get(recipe.method), "MASKED", False)


REPRESENTATIVE = (1 << 10, 1 << 10)
"""The shape that stands for all when the passes over a tensor are counted."""


def costs_of(recipe: Recipe, params, models: int) -> Costs:
    """What merging `models` models with these settings takes."""
    module = methods.get(recipe.method)
    if not hasattr(module, "lower"):
        return Costs(whole=True)
    if wants_model_gram(recipe):
        return Costs(model_readings=1)
    if getattr(module, "STATISTICS", ()):
        return Costs(readings=2)
    size = math.prod(REPRESENTATIVE)
    spec = lowered(recipe.method, params, REPRESENTATIVE, models, recipe.compat, recipe.trim_scope, size)
    ranked = sum(isinstance(t.keep, (Top, Band)) for t in spec.terms)
    rows = sum(isinstance(t.keep, RankedRandom) for t in spec.terms)
    normed = any(t.prescale == "l1" and not isinstance(t.keep, (All, Nothing)) for t in spec.terms)
    selections = 0 if spec.scope == "model" else ranked
    before = 2 * spec.needs_model_thresholds + spec.needs_model_signs
    return Costs(before, 1 + bool(selections) + normed, selections, rows, normed)


def tensor_info(sources: Mapping[ModelRef, Source], place: tuple[ModelRef, str]):
    """Dtype, shape and, for files, where an input tensor lies."""
    source, name = sources[place[0]], place[1]
    info = source.tensors.get(name)
    return source.tensors[source.aliases[name]] if info is None else info


def mask_name(masks: Source, name: str, task: int) -> str | None:
    """The key of one task's mask: its own, or the shared one."""
    return next((k for k in (f"{task}/{name}", name) if k in masks.tensors), None)


def mask_form(mask, shape: tuple[int, ...]) -> str | None:
    """How a mask is stored: a float dtype, "BYTES", "BITS", or None when it does not fit a tensor of this shape."""
    if tuple(mask.shape) == tuple(shape):
        return "BYTES" if mask.dtype in ("BOOL", "U8", "I8") else mask.dtype if mask.dtype in MERGEABLE else None
    return "BITS" if mask.dtype == "U8" and tuple(mask.shape) == (-(-math.prod(shape) // 8),) else None


def runs_of(tensors: Sequence[TensorPlan], most: int) -> Iterator[list[TensorPlan]]:
    """Stored tensors in their order, as many at a time as hold up to `most` elements, and at least one."""
    run, held = [], 0
    for tensor in tensors:
        if tensor.action == "alias":
            continue
        if run and held + tensor.size > most:
            yield run
            run, held = [], 0
        run.append(tensor)
        held += tensor.size
    if run:
        yield run
