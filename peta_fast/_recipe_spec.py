"""What a recipe is once it is read: frozen parts, the terms of a slice, and the values that hold for one tensor.

Source: precedence, filters and gradients as in mergekit 0.1.5, observed by running it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from peta_fast import methods
from peta_fast._recipe_settings import Setting, always
from peta_fast.errors import RecipeError
from peta_fast.methods import Key

COMPAT_NAMES = ("native", "mergekit", "mergekit-0.1.4", "peft", "ties-authors", "peta", "mats", "fusion_bench")
DTYPES = ("float32", "float16", "bfloat16")
TRIM_SCOPES = ("tensor", "row-block", "model")


@dataclass(frozen=True)
class AdapterRef:
    """An adapter on a model: path[@revision][*weight]."""

    path: str
    revision: str | None = None
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> AdapterRef:
        """Raises ValueError that says what is wrong with the text."""
        name, times, factor = text.rpartition("*")
        if not times:
            return cls(*_name_and_revision(text))
        try:
            weight = float(factor)
        except ValueError:
            weight = math.inf
        if not math.isfinite(weight):
            raise ValueError(f"the weight {factor!r}, which is no finite number")
        return cls(*_name_and_revision(name), weight)

    def __str__(self) -> str:
        return _spelled(self.path, self.revision) + (f"*{self.weight!r}" if self.weight != 1 else "")


@dataclass(frozen=True)
class ModelRef:
    """A model, with adapters or without: path[@revision][+adapter[@revision][*weight]]..."""

    path: str
    revision: str | None = None
    adapters: tuple[AdapterRef, ...] = ()

    @classmethod
    def parse(cls, text: str) -> ModelRef:
        """Raises ValueError that says what is wrong with the text."""
        model, *adapters = text.split("+")
        return cls(*_name_and_revision(model), tuple(map(AdapterRef.parse, adapters)))

    def __str__(self) -> str:
        return "+".join([_spelled(self.path, self.revision), *map(str, self.adapters)])


def _spelled(path: str, revision: str | None) -> str:
    return path + (f"@{revision}" if revision else "")


def _name_and_revision(text: str) -> tuple[str, str | None]:
    parts = text.split("@")
    if len(parts) > 2:
        raise ValueError("more than one '@' in one name")
    if not all(part and part == part.strip() and part.isprintable() for part in parts):
        raise ValueError("an empty name, or blanks where none belong")
    return parts[0], parts[1] if len(parts) == 2 else None


@dataclass(frozen=True)
class SourceSpec:
    """One model of a slice, with the settings that hold for it alone. layer_range is [first, last + 1)."""

    model: ModelRef
    layer_range: tuple[int, int] | None
    parameters: Mapping[str, Setting]


@dataclass(frozen=True)
class SliceSpec:
    """Layers that are merged together. base is the slice's own, else the recipe's."""

    sources: tuple[SourceSpec, ...]
    base: ModelRef | None
    parameters: Mapping[str, Setting]


@dataclass(frozen=True)
class ModuleSpec:
    """A part of the model with slices of its own. `models:` is one slice whose layer_range is None."""

    name: str
    slices: tuple[SliceSpec, ...]
    parameters: Mapping[str, Setting]


@dataclass(frozen=True)
class Recipe:
    """A merge, fully checked as far as that goes without looking into the models. Settings go by canonical names."""

    method: str
    base: ModelRef | None
    modules: tuple[ModuleSpec, ...]
    parameters: Mapping[str, Setting]
    dtype: str | None = None
    out_dtype: str | None = None
    compat: str = "native"
    seed: int = 0
    trim_scope: str = "tensor"
    tokenizer_source: str | None = None
    chat_template: str | None = None
    text: str = ""
    name: str | None = None
    _resolvers: dict = field(default_factory=dict, init=False, repr=False, compare=False)

    @cached_property
    def needs_base(self) -> bool:
        """Whether the base, where there is one, is what the models are merged onto and no model itself."""
        return bool(methods.needs_base(methods.get(self.method)))

    def references(self) -> tuple[ModelRef, ...]:
        """All distinct models, bases first, then in the order in which the recipe names them."""
        slices = [piece for module in self.modules for piece in module.slices]
        bases = [self.base, *(piece.base for piece in slices)]
        models = [source.model for piece in slices for source in piece.sources]
        return tuple(dict.fromkeys(model for model in bases + models if model is not None))

    def terms(self, slice: SliceSpec) -> tuple[SourceSpec, ...]:
        """The models that are merged, in order.

        Without the base where the method merges differences from it. For other methods (linear, slerp, passthrough)
        the base is a term like all others and comes first; under `models:` even where the list leaves it out.
        """
        return terms_of(slice, self.needs_base)

    def base_source(self, slice: SliceSpec) -> SourceSpec | None:
        """The base as the slice lists it; where it does not, the base with the layers of the first model."""
        return base_source_of(slice)

    def resolve(self, tensor_name: str, module: ModuleSpec, slice: SliceSpec, t: float | None) -> dict[str, Any]:
        """Every key of the method for one tensor.

        t  the layer's index in the slice / (layers of the slice - 1), 1.0 in a slice of one layer;
           None for a tensor that belongs to no layer, which takes the first value of gradients

        Returns canonical name -> value; of keys that each model sets, a tuple in the order of `terms(slice)`.
        Raises RecipeError when a key without a default has only filtered values and none matches.
        """
        place = id(module), id(slice)
        resolver = self._resolvers.get(place)
        if resolver is None:
            resolver = self._resolvers.setdefault(place, _Resolver(self, module, slice))
        return resolver.resolve(tensor_name, 0.0 if t is None else t)


def base_source_of(piece: SliceSpec) -> SourceSpec | None:
    if piece.base is None:
        return None
    for source in piece.sources:
        if source.model == piece.base:
            return source
    return SourceSpec(piece.base, piece.sources[0].layer_range, {})


def terms_of(piece: SliceSpec, needs_base: bool) -> tuple[SourceSpec, ...]:
    others = tuple(source for source in piece.sources if source.model != piece.base)
    base = base_source_of(piece)
    if needs_base or base is None:
        return others
    unlisted = len(others) == len(piece.sources)
    return others if unlisted and base.layer_range is not None else (base, *others)


class _Resolver:
    """The settings of one slice, with those of its module and of the recipe behind them.

    The conditions of all levels in order of precedence are one chain in which the first match wins,
    since a level where no filter matches gives way to the next. Tensors that match the same filters share one result.
    """

    def __init__(self, recipe: Recipe, module: ModuleSpec, piece: SliceSpec):
        self.owners = recipe.name or "recipe", module, piece  # held, so that their ids stay theirs
        outer = piece.parameters, module.parameters, recipe.parameters
        self.terms = recipe.terms(piece)
        self.shared: dict[str, Setting] = {}
        self.per_model: dict[str, list[Setting]] = {}
        for key in methods.keys(methods.get(recipe.method)).values():
            if key.per_model:
                self.per_model[key.name] = [_chain(key, term.parameters, *outer) for term in self.terms]
            else:
                self.shared[key.name] = _chain(key, *outer)
        chains = [*self.shared.values(), *(chain for chains in self.per_model.values() for chain in chains)]
        self.filters = tuple({condition.filter for chain in chains for condition in chain if condition.filter})
        self.results: dict = {}

    def resolve(self, tensor_name: str, t: float) -> dict[str, Any]:
        place = frozenset([text for text in self.filters if text in tensor_name]), t
        result = self.results.get(place)
        if result is None:
            result = self.results[place] = self._evaluate(tensor_name, t)
        return dict(result)

    def _evaluate(self, tensor_name: str, t: float) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name, chain in self.shared.items():
            values[name] = self._first(chain, tensor_name, t, f"'{name}'")
        for name, chains in self.per_model.items():
            values[name] = tuple(
                self._first(chain, tensor_name, t, f"'{name}' of model '{term.model}'")
                for term, chain in zip(self.terms, chains, strict=True)
            )
        return values

    def _first(self, chain: Setting, tensor_name: str, t: float, what: str) -> Any:
        for condition in chain:
            if condition.filter in tensor_name:
                return condition.at(t)
        raise RecipeError(
            self.owners[0],
            f"{what} has no value for tensor '{tensor_name}': none of its filters matches",
            "Add a last entry that has a value and no filter.",
        )


def _chain(key: Key, *levels: Mapping[str, Setting]) -> Setting:
    given = tuple(condition for level in levels for condition in level.get(key.name, ()))
    return given if key.required else given + always(key.default)
