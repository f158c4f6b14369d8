"""From a recipe to a plan, by headers alone: what happens to every tensor, and what it will take.

Every tensor is merged, copied, averaged, aliased or refused - by name, before any work; all faults at once.
"""

from __future__ import annotations

import contextlib
import gc
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peta_fast import methods
from peta_fast._assignment import Assignment, Source, assign, kept_ties
from peta_fast._beside import Beside, BesidePlaces
from peta_fast._tensor_plan import (
    Costs,
    TensorPlan,
    costs_of,
    is_masked,
    mask_form,
    mask_name,
    spec_of,
    tensor_info,
    wants_model_gram,
)
from peta_fast.buffers import ITEMSIZE, MERGEABLE, SHORT_NAMES, is_floating
from peta_fast.errors import CompatibilityError, RecipeError, ResourceError
from peta_fast.formats import ShardLayout, layout_shards, open_checkpoint
from peta_fast.formats.adapted_checkpoint import AdaptedCheckpoint, refuse_bare_adapter
from peta_fast.formats.hub import locate
from peta_fast.formats.lora_adapter import LoraAdapter, open_adapter
from peta_fast.formats.trained_only import METADATA, holds_trained_only
from peta_fast.recipe import ModelRef, Recipe

SLAB = 8 << 20
"""Bytes of output made and written at once; less when memory is short."""
RING = 6
"""Slabs under way at once: one being made, three being written, the others waiting for it."""
SMALLEST_SLAB = 128 << 10
BATCH = 1 << 25
"""Elements of tensors that are got ready together, where memory is not short."""
BASIC_MEMORY = 8 << 20
READ_RATE, WRITE_RATE = 6e9, 1.5e9
"""Bytes a second that the estimate of time assumes: inputs in the page cache, a local solid-state disk."""
SHOWN = 8
"""Misfits that an error lists."""


@dataclass(frozen=True)
class Plan:
    """A merge before it is run.

    tensors      of the output, names that stay tied last
    sources      the opened models
    masks        the opened mask file, for masked methods
    beside       the opened statistics, and the checkpoint that a solver begins from
    tokenizer    the folder that the tokenizer is taken from, where the recipe names one
    aliases      tied name -> name it is stored under
    slab         bytes made and written at once
    bytes_read   inputs, each reading counted
    peak_memory  bytes of working memory, file-backed pages not counted
    """

    recipe: Recipe
    tensors: tuple[TensorPlan, ...]
    layouts: tuple[ShardLayout, ...]
    sources: Mapping[ModelRef, Any]
    masks: Any
    tokenizer: Path | None
    aliases: Mapping[str, str]
    slab: int
    bytes_read: int
    bytes_written: int
    peak_memory: int
    warnings: tuple[str, ...] = ()
    beside: Beside = field(default_factory=Beside)

    @property
    def donor(self) -> ModelRef:
        """The model whose other files are carried along: the base, or the first one."""
        return self.recipe.references()[0]

    @property
    def disk_needed(self) -> int:
        """Bytes of the shards."""
        return sum(layout.size for layout in self.layouts)

    @property
    def seconds_estimate(self) -> float:
        return 0.3 + max(self.bytes_read / READ_RATE, self.bytes_written / WRITE_RATE)

    @property
    def merged_size(self) -> int:
        """Elements of all merged tensors: the trim scope "model"."""
        return merged_size(self.tensors)

    def to_json(self) -> dict[str, Any]:
        return {
            "method": self.recipe.method,
            "compat": self.recipe.compat,
            "seed": self.recipe.seed,
            "models": [str(r) for r in self.recipe.references()],
            "tensors": [t.to_json() for t in self.tensors],
            "shards": [{"file": s.filename, "bytes": s.size, "tensors": len(s.offsets)} for s in self.layouts],
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "peak_memory": self.peak_memory,
            "disk_needed": self.disk_needed,
            "seconds_estimate": round(self.seconds_estimate, 2),
            "warnings": list(self.warnings),
        }


def make_plan(
    recipe: Recipe,
    *,
    max_memory: int = 768 << 20,
    max_shard_size: int = 5 << 30,
    threads: int = 0,
    trained_only: bool = False,
) -> Plan:
    """Opens every model of the recipe and decides what happens to every tensor.

    trained_only  what is frozen in every model is left out, and the output says so; see formats.trained_only

    Raises RecipeError for values that the method refuses, CheckpointError for files that cannot be read,
    CompatibilityError with all tensors that do not fit, ResourceError when max_memory is too small.
    """
    with _nothing_collected():
        return _make_plan(recipe, max_memory, max_shard_size, trained_only)


def _trained(recipe: Recipe, sources, tensors: list[TensorPlan]) -> list[TensorPlan]:
    """Without what no model has trained. Raises RecipeError for models that hold more than what was trained."""
    whole = [ref for ref in recipe.references()[1:] if not holds_trained_only(sources[ref])]
    if recipe.base is None or whole:
        got = f"{whole[0]}, which holds all tensors" if whole else f"{recipe.method}, which takes no base"
        raise RecipeError("trained_only", f"expected checkpoints of trained tensors alone, got {got}", "Leave it out.")
    return [t for t in tensors if t.action in ("merge", "average") and t.reason != FROZEN]


@contextlib.contextmanager
def _nothing_collected():
    """Without the garbage collector, which finds nothing among a million small objects that are all in use."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _make_plan(recipe: Recipe, max_memory: int, max_shard_size: int, trained_only: bool) -> Plan:
    _refuse_named_template(recipe)
    tokenizer = _tokenizer(recipe)
    sources = _open_all(recipe.references())
    masks = open_masks(recipe)
    beside = Beside()
    tensors = plan_tensors(recipe, sources, masks, beside)
    if trained_only:
        tensors = _trained(recipe, sources, tensors)
    ties = kept_ties(recipe, sources)
    aliases = {t.name: ties[t.name] for t in tensors if t.action == "alias"}
    kind = METADATA if trained_only else {}
    stored = [(t.name, t.dtype, t.shape) for t in tensors if t.action != "alias"]
    layouts = tuple(layout_shards(stored, max_shard_size=max_shard_size, metadata=aliases | kind))
    slab, peak = _memory(tensors, max_memory)
    return Plan(
        recipe,
        tuple(tensors),
        layouts,
        sources,
        masks,
        tokenizer,
        aliases,
        slab,
        bytes_read=sum(t.bytes_read for t in tensors),
        bytes_written=sum(layout.size for layout in layouts),
        peak_memory=peak,
        warnings=tuple(f"{t.name}: {t.reason}" for t in tensors if t.reason.startswith(UNTIED)),
        beside=beside,
    )


def _open_all(references: Sequence[ModelRef]) -> dict[ModelRef, Source]:
    """Every model; one that stands alone and under adapters is opened once, so that its changes are known as such."""
    models: dict[tuple, Any] = {}
    adapters: dict[tuple, LoraAdapter] = {}
    opened = {}
    for ref in references:
        place = ref.path, ref.revision
        if place not in models:
            found = locate(*place)
            refuse_bare_adapter(found)
            models[place] = open_checkpoint(found)
        for a in ref.adapters:
            if (a.path, a.revision) not in adapters:
                adapters[a.path, a.revision] = open_adapter(locate(a.path, a.revision))
        weighted = [(adapters[a.path, a.revision], a.weight) for a in ref.adapters]
        opened[ref] = AdaptedCheckpoint(models[place], weighted) if weighted else models[place]
    return opened


def open_masks(recipe: Recipe):
    """The opened file of masks, None for methods without."""
    if not is_masked(recipe):
        return None
    module = recipe.modules[0]
    return open_checkpoint(recipe.resolve("", module, module.slices[0], None)["mask"])


def _refuse_named_template(recipe: Recipe) -> None:
    if recipe.chat_template not in (None, "auto") and "{" not in recipe.chat_template:
        raise RecipeError("chat_template", f"expected 'auto' or Jinja text, got the name {recipe.chat_template!r}")


def _tokenizer(recipe: Recipe) -> Path | None:
    """Raises CheckpointError when the model that is to give the tokenizer is not there."""
    if recipe.tokenizer_source in (None, "base"):
        return None
    ref = ModelRef.parse(recipe.tokenizer_source)
    return locate(ref.path, ref.revision, weights=False)


def plan_tensors(
    recipe: Recipe, sources: Mapping[ModelRef, Source], masks: Source | None, beside: Beside | None = None
) -> list[TensorPlan]:
    """What happens to every tensor, for models in files or in memory; names that stay tied come last.

    beside  opens statistics and the like, and holds them from then on

    Raises RecipeError for parameters, CompatibilityError for names, shapes and dtypes, each with all faults.
    """
    planner = _Planner(recipe, sources, masks, beside or Beside())
    found = [planner.plan(a) for a in assign(recipe, sources, planner.misfits)]
    planner.check_statistics()
    planner.raise_faults()
    _require_one_trim(recipe, found)
    by_name = {t.name: t for t in found}
    ties = {alias: by_name[name] for alias, name in kept_ties(recipe, sources).items() if name in by_name}
    return found + [
        TensorPlan(alias, "alias", t.dtype, t.shape, None, (), reason=f"tied to {t.name}") for alias, t in ties.items()
    ]


UNTIED = "stored apart in"
FROZEN = "frozen: trained in no model"


class _Planner:
    """Decides tensor by tensor and collects what does not fit."""

    def __init__(self, recipe: Recipe, sources, masks, beside: Beside):
        self.recipe, self.sources, self.masks, self.beside = recipe, sources, masks, beside
        self.method = methods.get(recipe.method)
        wanted = recipe.out_dtype or recipe.dtype
        self.out_dtype = SHORT_NAMES[wanted] if wanted else None
        self.aliases = sources[recipe.references()[0]].aliases
        self.misfits: list[str] = []
        self.refused: dict[str, None] = {}
        self.params: dict[Any, Any] = {}
        self.described: dict[str, set[str]] = {}

    def plan(self, a: Assignment) -> TensorPlan:
        places = (a.base, *a.models) if a.base else a.models
        infos = [tensor_info(self.sources, place) for place in places]
        first = infos[0]
        self._compare(places, infos)
        read = self._bytes_read(places, infos)
        dtype = self.out_dtype or first.dtype
        if not is_floating(first.dtype):
            return self._copy(a, first, places, "not floating point")
        if not a.models:
            return self._frozen(a, first, dtype)
        if len(places) == 1 and first.dtype not in MERGEABLE:
            return self._copy(a, first, places, "taken as it is")
        if a.base and a.name.endswith((".running_mean", ".running_var")):
            read -= math.prod(first.shape) * ITEMSIZE[first.dtype]
            why = "batch norm statistics"
            return TensorPlan(a.name, "average", dtype, first.shape, None, a.models, reason=why, input_bytes=read)
        values = self.recipe.resolve(a.name, a.module, a.piece, a.position)
        params, costs = self._build(values, a)
        read += self._check_masks(a, first)
        why = self._why_untied(a)
        beside, solving = self._find_beside(params, a, first)
        if isinstance(beside, str):
            read -= math.prod(first.shape) * ITEMSIZE[first.dtype] if a.base else 0
            weights = {"weight": values["weight"]}
            return TensorPlan(
                a.name, "average", dtype, first.shape, None, a.models, weights, reason=beside, input_bytes=read
            )
        factors = sum(getattr(info, "factor_bytes", 0) for info in infos)
        return TensorPlan(
            a.name, "merge", dtype, first.shape, a.base, a.models, values, params, why, costs, read, beside, solving,
            factors,
        )  # fmt: skip

    def _find_beside(self, params, a: Assignment, info) -> tuple[BesidePlaces | str, int]:
        """Where the tensor's statistics are, or why it has none; and the bytes that solving takes."""
        if not hasattr(self.method, "needs") or self.refused:
            return BesidePlaces(), 0
        places = self.beside.places(self.method, params, a.name, a.models, info.shape, self.sources, self.misfits)
        for file, (ref, _) in zip(params.statistics, a.models, strict=True):
            if () not in self.method.needs(params):
                self.described.setdefault(file, set()).update(self.sources[ref].tensors, self.sources[ref].aliases)
        return places, self.method.memory(params, info.shape, len(a.models))

    def check_statistics(self) -> None:
        """Statistics must belong to their models, and serve for something."""
        if not self.described or self.refused:
            return
        self.misfits.extend(self.beside.leftovers(self.described))
        self.misfits.extend(self.beside.foreigners())
        if not self.beside.solved and not self.misfits:
            self.misfits.append(f"{', '.join(self.described)}: no tensor has what {self.recipe.method} solves with")

    def _bytes_read(self, places, infos) -> int:
        """Of one reading; a model and the same model under adapters are one."""
        found: dict[Any, int] = {}
        for place, info in zip(places, infos, strict=True):
            source = self.sources[place[0]]
            owner = source.origin_of(place[1]) if hasattr(source, "origin_of") else source
            found[id(owner), place[1]] = math.prod(info.shape) * ITEMSIZE[info.dtype]
        return sum(found.values()) + sum(getattr(info, "read_bytes", 0) for info in infos)

    def _copy(self, a: Assignment, info, places, why: str) -> TensorPlan:
        read = math.prod(info.shape) * ITEMSIZE[info.dtype]
        return TensorPlan(a.name, "copy", info.dtype, info.shape, None, places[:1], reason=why, input_bytes=read)

    def _frozen(self, a: Assignment, info, dtype: str) -> TensorPlan:
        """What no model has trained: the base's own, in the output's dtype."""
        if dtype == info.dtype or info.dtype not in MERGEABLE:
            return self._copy(a, info, (a.base,), FROZEN)
        read = math.prod(info.shape) * ITEMSIZE[info.dtype]
        return TensorPlan(a.name, "average", dtype, info.shape, None, (a.base,), reason=FROZEN, input_bytes=read)

    def _compare(self, places, infos) -> None:
        """All tensors that are merged into one must have its shape, and dtypes that can be merged."""
        first, floating = infos[0], is_floating(infos[0].dtype)
        for place, info in zip(places[1:], infos[1:], strict=True):
            if info.shape != first.shape:
                self.misfits.append(
                    f"{place[1]!r} is {list(info.shape)} in {place[0]}, {list(first.shape)} in {places[0][0]}"
                )
            if is_floating(info.dtype) != floating:
                self.misfits.append(f"{place[1]!r} is {info.dtype} in {place[0]}, {first.dtype} in {places[0][0]}")
        if floating and len(places) > 1:
            for place, info in zip(places, infos, strict=True):
                if info.dtype not in MERGEABLE and is_floating(info.dtype):
                    self.misfits.append(
                        f"{place[1]!r} is {info.dtype} in {place[0]}; expected {', '.join(MERGEABLE)}, convert it first"
                    )

    def _why_untied(self, a: Assignment) -> str:
        """What to say of a name that the first model ties and another one does not."""
        if a.name not in self.aliases:
            return ""
        apart = [ref for ref, name in a.models if name in self.sources[ref].tensors]
        return f"{UNTIED} {apart[0]}, tied to {self.aliases[a.name]} in {self.recipe.references()[0]}" if apart else ""

    def _build(self, values: Mapping[str, Any], a: Assignment):
        """The method's Params, and what they cost."""
        key = len(a.models), *values.values()
        if key not in self.params:
            params = methods.build(self.method, values)
            faults = self._faults_of(params, a)
            self.refused.update(dict.fromkeys(faults))
            self.params[key] = params, Costs() if faults else costs_of(self.recipe, params, len(a.models))
        return self.params[key]

    def _faults_of(self, params, a: Assignment) -> list[str]:
        wanted, models = getattr(self.method, "MODELS", None), len(a.models)
        if a.base is None and hasattr(self.method, "wants_base") and self.method.wants_base(params, self.recipe.compat):
            return [f"{self.recipe.method} needs a base_model with these settings"]
        if wanted and models != wanted:
            return [f"{self.recipe.method} takes {wanted} models, got {models}"]
        return self.method.check(params, self.recipe.compat) if hasattr(self.method, "check") else []

    def _check_masks(self, a: Assignment, info) -> int:
        """Bytes of the tensor's masks, each counted once."""
        if self.masks is None:
            return 0
        names = [mask_name(self.masks, a.name, t) for t in range(len(a.models))]
        if None in names:
            self.misfits.append(f"no mask for {a.name!r} (task {names.index(None)})")
            return 0
        masks = [self.masks.tensors[name] for name in dict.fromkeys(names)]
        for name, mask in zip(dict.fromkeys(names), masks, strict=True):
            if mask_form(mask, info.shape) is None:
                self.misfits.append(
                    f"mask {name!r} is {mask.dtype} {list(mask.shape)}, expected one value or one bit for each of "
                    f"{list(info.shape)}"
                )
        return sum(mask.nbytes for mask in masks)

    def raise_faults(self) -> None:
        if self.refused:
            raise RecipeError(self.recipe.name or self.recipe.method, "; ".join(self.refused))
        misfits = list(dict.fromkeys(self.misfits))
        if misfits:
            more = len(misfits) - SHOWN
            of_files = tuple(f"{name}: " for name in self.beside.files)
            next_step = "Run `peta-fast diff` on two of them."
            if of_files and all(misfit.startswith(of_files) for misfit in misfits):
                next_step = "Give each model the file that was collected from it, or collect it again."
            raise CompatibilityError(
                "models do not fit together",
                "; ".join(misfits[:SHOWN]) + (f"; {more} more differ" if more > 0 else ""),
                next_step,
            )


def _require_one_trim(recipe: Recipe, tensors: list[TensorPlan]) -> None:
    """With trim scope "model", one threshold a task holds for all tensors. Raises RecipeError."""
    if not any(t.costs.model_readings for t in tensors) or wants_model_gram(recipe):
        return
    total = merged_size(tensors)
    found: dict[tuple, TensorPlan] = {}
    for tensor in {t.params: t for t in tensors if t.action == "merge"}.values():
        found.setdefault(tuple(term.keep for term in spec_of(recipe, tensor, total).terms), tensor)
    if len(found) > 1:
        first, second = list(found.values())[:2]
        raise RecipeError(
            recipe.name or recipe.method,
            f"trims the model as a whole, so one density must hold for all tensors; got {first.parameters} for "
            f"{first.name!r}, {second.parameters} for {second.name!r}",
            "Use trim_scope: tensor, or remove filters and gradients of the density.",
        )


def merged_size(tensors) -> int:
    """Elements of all merged tensors."""
    return sum(t.size for t in tensors if t.action == "merge")


def _memory(tensors: list[TensorPlan], max_memory: int) -> tuple[int, int]:
    """The slab size that fits into max_memory, and the peak of working memory with it."""
    slab, peak = SLAB, _peak(tensors, SLAB)
    while slab > SMALLEST_SLAB and peak > max_memory:
        slab //= 2
        peak = _peak(tensors, slab)
    if peak > max_memory:
        raise ResourceError(
            "--max-memory", f"expected at least {peak:,} bytes for the largest tensor, got {max_memory:,}"
        )
    return slab, peak


def _peak(tensors: list[TensorPlan], slab: int) -> int:
    together = min(batch_size(slab), merged_size(tensors))
    beside = max((t.costs.memory(t, slab, together) for t in tensors if t.action == "merge"), default=0)
    return BASIC_MEMORY + RING * slab + beside + 2 * _factors(tensors, max(slab, batch_size(slab)))


def _factors(tensors: list[TensorPlan], together: int) -> int:
    """Bytes of low-rank factors that one batch has at most: tensors of so many elements, or parts of two."""
    most = held = size = 0
    window: deque[TensorPlan] = deque()
    for tensor in tensors:
        window.append(tensor)
        held, size = held + tensor.factor_bytes, size + tensor.size
        while len(window) > 2 and size - window[0].size > together:
            held, size = held - window[0].factor_bytes, size - window.popleft().size
        most = max(most, held)
    return most


def batch_size(slab: int) -> int:
    """Elements of tensors that are got ready together; 0 where memory is short: those of one slab."""
    return BATCH if slab == SLAB else 0
