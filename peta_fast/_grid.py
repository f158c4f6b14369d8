"""Grids over a recipe's settings: how they are spelled, which points they have, and the recipe of each point.

    weight=0.1:1.0:0.1   from 0.1 to 1.0 in steps of 0.1, both ends included
    density=0.1,0.2,0.5  these values
    weight.math=0,0.5    of the model whose folder is called math; weight.0 of the first

A key takes the place of every setting of it in the recipe: those of models, slices and modules too.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from typing import Any

from peta_fast import methods
from peta_fast._recipe_settings import always
from peta_fast.errors import RecipeError
from peta_fast.methods import Key
from peta_fast.recipe import TRIM_SCOPES, ModelRef, ModuleSpec, Recipe, SliceSpec, edit_text, read_value, unknown_name

OTHER_KEYS = ("seed", "trim_scope")
LONGEST_AXIS = 1_000_000
CHEAP_KEYS = ("normalize", "weight", "scaling", "lambda")
"""Keys that leave the kept entries alone: points that differ in these alone share most, those in the last ones all."""
LONGEST_NAME = 120


@dataclass(frozen=True)
class Axis:
    """One key and the values it takes."""

    key: str
    values: tuple[Any, ...]


def read_axes(texts: Sequence[str]) -> list[Axis]:
    """Axes as the command line spells them. Raises RecipeError with all faults."""
    axes, faults = [], []
    for text in texts:
        try:
            axes.append(_read_axis(text))
        except RecipeError as error:
            faults.append(f"{error.who}: {error.problem}")
    if faults:
        raise RecipeError("--grid", "; ".join(faults))
    return axes


def axes_of(grid: Mapping[str, Any] | Sequence[str]) -> list[Axis]:
    """Axes of a mapping of keys to values, or of texts as `read_axes` takes them."""
    if not isinstance(grid, Mapping):
        return read_axes([grid] if isinstance(grid, str) else grid)
    return [
        _read_axis(f"{key}={values}")
        if isinstance(values, str)
        else Axis(key, tuple(_plain(v) for v in (values if hasattr(values, "__iter__") else [values])))
        for key, values in grid.items()
    ]


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


def _read_axis(text: str) -> Axis:
    key, equals, listed = text.partition("=")
    if not equals or not key.strip() or not listed.strip():
        raise RecipeError(repr(text), "expected KEY=VALUE,... or KEY=START:STOP:STEP")
    values: list[Any] = []
    for part in listed.split(","):
        values.extend(_range(key, part) if ":" in part else [_scalar(part.strip())])
        if len(values) > LONGEST_AXIS:
            raise RecipeError(key, f"has more than {LONGEST_AXIS:,} values")
    return Axis(key.strip(), tuple(values))


def _range(key: str, text: str) -> list[Any]:
    try:
        start, stop, step = (Decimal(p.strip()) for p in text.split(":"))
        finite = start.is_finite() and stop.is_finite() and step.is_finite()
    except (InvalidOperation, ValueError):
        raise RecipeError(key, f"expected START:STOP:STEP, got {text!r}") from None
    if not finite or not step or (stop - start) / step < 0:
        raise RecipeError(key, f"{text!r} has no values: expected a step that leads from start to stop")
    count = int((stop - start) / step) + 1
    if count > LONGEST_AXIS:
        raise RecipeError(key, f"{text!r} has {_count_text(count)} values, expected at most {LONGEST_AXIS:,}")
    whole = all(number == number.to_integral_value() for number in (start, step)) and "." not in text
    return [int(start + i * step) if whole else float(start + i * step) for i in range(count)]


def _count_text(count: int) -> str:
    return f"{count:,}" if count < 10**18 else f"{Decimal(count):.1e}"


def _scalar(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


class Grid:
    """All combinations of some axes; nothing is kept of them. Raises RecipeError with all faults."""

    def __init__(self, recipe: Recipe, axes: Sequence[Axis]):
        if not axes:
            raise RecipeError("grid", "expected at least one KEY=VALUES")
        faults: list[str] = []
        self.recipe = recipe
        self.axes = [_checked(recipe, axis, faults) for axis in axes]
        _refuse_doubles(recipe, self.axes, faults)
        if faults:
            raise RecipeError("grid", "; ".join(faults))

    def __len__(self) -> int:
        return math.prod(len(a.values) for a in self.axes)

    def point(self, index: int) -> dict[str, Any]:
        """The values at a place in the grid's order, in which the last axis changes fastest."""
        values = {}
        for axis in reversed(self.axes):
            index, place = divmod(index, len(axis.values))
            values[axis.key] = axis.values[place]
        return {axis.key: values[axis.key] for axis in self.axes}

    def order(self) -> Iterator[int]:
        """Every place once, so that those come together that share most."""
        strides, stride = {}, 1
        for axis in reversed(self.axes):
            strides[axis.key] = stride
            stride *= len(axis.values)
        by_cost = sorted(self.axes, key=lambda axis: _cheapness(axis.key))
        places = [0] * len(by_cost)
        for _ in range(len(self)):
            yield sum(place * strides[axis.key] for place, axis in zip(places, by_cost, strict=True))
            for k in reversed(range(len(by_cost))):
                places[k] = (places[k] + 1) % len(by_cost[k].values)
                if places[k]:
                    break

    def block(self) -> int:
        """How many points that follow each other in `order` differ in cheap keys alone."""
        return math.prod(len(a.values) for a in self.axes if _cheapness(a.key) >= 0)

    def name(self, index: int) -> str:
        """A point as a folder's name: density-0.2_weight-0.5."""
        parts = [f"{key}-{_as_text(value)}" for key, value in self.point(index).items()]
        name = re.sub(r"[^A-Za-z0-9._+-]", "-", "_".join(parts))
        unique = all(len({_as_text(v) for v in a.values}) == len(a.values) for a in self.axes)
        plain = unique and all(isinstance(v, bool | int | float) for a in self.axes for v in a.values)
        return name if plain and len(name) <= LONGEST_NAME else f"point-{index:0{len(str(len(self) - 1))}d}"

    def recipe_of(self, index: int, *, with_text: bool = False) -> Recipe:
        """The recipe of a point. with_text: its text says so too, as a model card wants it."""
        point = self.point(index)
        recipe = self.recipe
        for key, value in point.items():
            recipe = _with_value(recipe, key, value)
        return replace(recipe, text=self.text_of(index)) if with_text else recipe

    def text_of(self, index: int) -> str:
        """YAML of a point's recipe, which `load_recipe` reads to the same."""
        point = self.point(index)
        return edit_text(self.recipe, lambda document: _edit(self.recipe, document, point))


def _as_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _cheapness(key: str) -> int:
    name = key.partition(".")[0]
    return CHEAP_KEYS.index(name) if name in CHEAP_KEYS else -1


def _keys(recipe: Recipe) -> dict[str, Key]:
    return methods.keys(methods.get(recipe.method))


def _checked(recipe: Recipe, axis: Axis, faults: list[str]) -> Axis:
    name, dot, model = axis.key.partition(".")
    keys = _keys(recipe)
    if not axis.values:
        faults.append(f"'{axis.key}' has no values")
    if axis.key in OTHER_KEYS:
        faults.extend(_faults_of_other(axis))
        return axis
    if name not in keys:
        faults.append(f"'{axis.key}' is not a key of {recipe.method}{unknown_name(name, (*keys, *OTHER_KEYS))}")
        return axis
    key = keys[name]
    if dot and not key.per_model:
        faults.append(f"'{axis.key}': '{name}' holds for all models")
    elif dot and _model_of(recipe, model) is None:
        known = [os.path.basename(ref.path) for ref in _merged_models(recipe)]
        faults.append(f"'{axis.key}': no model is called {model!r}{unknown_name(model, known)}")
    values = []
    for value in axis.values:
        try:
            values.append(read_value(value, replace(key, name=axis.key)))
        except RecipeError as error:
            faults.append(error.problem)
    if len(set(map(repr, values))) < len(values):
        faults.append(f"'{axis.key}' has a value twice")
    return Axis(axis.key, tuple(values))


def _faults_of_other(axis: Axis) -> list[str]:
    if axis.key == "seed":
        good = all(type(v) is int and 0 <= v < 1 << 64 for v in axis.values)
        return [] if good else ["'seed' takes integers from 0 to 2^64 - 1"]
    wrong = [v for v in axis.values if v not in TRIM_SCOPES]
    return [f"'trim_scope' is {wrong[0]!r}, expected {', '.join(TRIM_SCOPES)}"] if wrong else []


def _refuse_doubles(recipe: Recipe, axes: Sequence[Axis], faults: list[str]) -> None:
    seen: set[tuple] = set()
    for axis in axes:
        name, _, model = axis.key.partition(".")
        key = _keys(recipe).get(name)
        name = key.name if key else name
        mine = _model_of(recipe, model) if model else None
        if any(other == name and (mine is None or ref is None or ref == mine) for other, ref in seen):
            faults.append(f"'{axis.key}' is given twice")
        seen.add((name, mine))


def _merged_models(recipe: Recipe) -> list[ModelRef]:
    terms = [t.model for module in recipe.modules for piece in module.slices for t in recipe.terms(piece)]
    return list(dict.fromkeys(terms))


def _model_of(recipe: Recipe, name: str) -> ModelRef | None:
    """A merged model by its place or its folder's name."""
    models = _merged_models(recipe)
    if name.isdigit():
        return models[int(name)] if int(name) < len(models) else None
    found = [ref for ref in models if name in (str(ref), os.path.basename(ref.path.rstrip("/")))]
    return found[0] if len(found) == 1 else None


def _with_value(recipe: Recipe, spelled: str, value: Any) -> Recipe:
    if spelled in OTHER_KEYS:
        return replace(recipe, **{spelled: value})
    name, _, model = spelled.partition(".")
    key = _keys(recipe)[name]
    setting = always(value, key.kind)
    target = _model_of(recipe, model) if model else None

    def changed(parameters: Mapping, own: bool) -> Mapping:
        rest = {k: v for k, v in parameters.items() if k != key.name or target is not None}
        return {**rest, key.name: setting} if own else rest

    def of_slice(piece: SliceSpec) -> SliceSpec:
        sources = tuple(replace(s, parameters=changed(s.parameters, s.model == target)) for s in piece.sources)
        return replace(piece, sources=sources, parameters=changed(piece.parameters, False))

    def of_module(module: ModuleSpec) -> ModuleSpec:
        return replace(module, slices=tuple(map(of_slice, module.slices)), parameters=changed(module.parameters, False))

    return replace(
        recipe,
        modules=tuple(map(of_module, recipe.modules)),
        parameters=changed(recipe.parameters, target is None),
    )


def _edit(recipe: Recipe, document: dict, point: Mapping[str, Any]) -> None:
    """The same changes in a recipe's document."""
    document["compat"] = recipe.compat
    if recipe.seed:
        document["seed"] = recipe.seed
    for spelled, value in point.items():
        if spelled in OTHER_KEYS:
            document[spelled] = value
            continue
        name, _, model = spelled.partition(".")
        keys = _keys(recipe)
        names = [k for k, key in keys.items() if key.name == keys[name].name]
        target = _model_of(recipe, model) if model else None
        for level in _levels(document):
            parameters = level.get("parameters")
            own = target is not None and "model" in level and ModelRef.parse(level["model"]) == target
            if isinstance(parameters, dict) and (target is None or own):
                for k in names:
                    parameters.pop(k, None)
            if own or (target is None and level is document):
                level["parameters"] = {**(parameters or {}), keys[name].name: value}


def _levels(document: dict) -> Iterator[dict]:
    """Every mapping of a recipe that may have parameters."""
    yield document
    for holder in (document, *(document.get("modules") or {}).values()):
        if holder is not document:
            yield holder
        yield from holder.get("models") or ()
        for piece in holder.get("slices") or ():
            yield piece
            yield from piece.get("sources") or ()
