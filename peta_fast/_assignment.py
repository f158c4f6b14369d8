"""Which tensors of which models become which output tensor, by name alone; every fault is collected before any work.

Names that the first model stores once and calls by two names stay tied when every model ties them, or lacks the second
name; where one model stores both apart, they are merged apart.

A layer is the first number in a tensor's name: `model.layers.3.mlp.up_proj.weight` is layer 3 of `model.layers`. Its
place in a gradient is 3 / (layers - 1); a tensor without a number has none.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from peta_fast.buffers import Buffer
from peta_fast.formats.trained_only import holds_trained_only
from peta_fast.recipe import ModelRef, ModuleSpec, Recipe, SliceSpec, SourceSpec

LAYER = re.compile(r"^(.*?)\.(\d+)\.(.*)$")
BEFORE_LAYERS = ("embed", "wte", "wpe", "patch", "cls_token", "conv1", "stem")
"""Parts of the names of tensors that stand before the layers; in slices they come from the first, all others last."""


class Source(Protocol):
    """Tensors by name, as a Checkpoint has them."""

    tensors: Mapping[str, Any]
    aliases: Mapping[str, str]

    def buffer(self, name: str, start: int = 0, stop: int | None = None) -> Buffer: ...


@dataclass(frozen=True, slots=True)
class Assignment:
    """One output tensor and where it comes from.

    base, models  (model, name of the tensor there); no models where none of them has trained it
    position      of its layer in gradients, None outside layers
    """

    name: str
    base: tuple[ModelRef, str] | None
    models: tuple[tuple[ModelRef, str], ...]
    module: ModuleSpec
    piece: SliceSpec
    position: float | None


def layer_of(name: str) -> tuple[str, int, str] | None:
    """(path before the number, the number, path after it), or None."""
    match = LAYER.match(name)
    return (match[1], int(match[2]), match[3]) if match else None


def main_layers(names) -> tuple[str, int]:
    """The path whose numbers are the model's layers - the one with most tensors - and how many there are."""
    counts: Counter[str] = Counter()
    last: dict[str, int] = defaultdict(int)
    for path, layer, _ in filter(None, map(layer_of, names)):
        counts[path] += 1
        last[path] = max(last[path], layer)
    if not counts:
        return "", 0
    path = max(counts, key=lambda p: (counts[p], p))
    return path, last[path] + 1


def assign(recipe: Recipe, sources: Mapping[ModelRef, Source], faults: list[str]) -> list[Assignment]:
    """All output tensors, in the order of the model that gives the names. What does not fit by name goes to faults."""
    found: list[Assignment] = []
    ties = kept_ties(recipe, sources)
    several = len(recipe.modules) > 1
    for module in recipe.modules:
        part = _Part(recipe, module, f"{module.name}." if several else "", sources, ties, faults)
        found.extend(part.stacked() if is_stacked(module) else part.whole_models())
    if several:
        _require_all_covered(recipe, sources, ties, faults)
    return found


def is_stacked(module: ModuleSpec) -> bool:
    """Whether the module is made of layer ranges."""
    return len(module.slices) > 1 or any(s.layer_range for s in module.slices[0].sources)


def kept_ties(recipe: Recipe, sources: Mapping[ModelRef, Source]) -> dict[str, str]:
    """Names of the first model that stay tied in the output: name -> name it is stored under.

    In stacked layers there are none: numbers change there, and ties with them.
    """
    donor, *others = (sources[ref] for ref in recipe.references())
    kept = {
        alias: name
        for alias, name in donor.aliases.items()
        if all(stored_name(o, alias) in (None, stored_name(o, name)) for o in others)
    }
    if any(map(is_stacked, recipe.modules)):
        path, _ = main_layers(donor.tensors)
        kept = {alias: name for alias, name in kept.items() if path not in (_path(alias), _path(name))}
    return kept


def stored_name(source: Source, name: str) -> str | None:
    """The name that a tensor's bytes have in a model, None where it is not there."""
    return name if name in source.tensors else source.aliases.get(name)


def _path(name: str) -> str | None:
    found = layer_of(name)
    return found[0] if found else None


def _members(recipe: Recipe, piece: SliceSpec) -> tuple[ModelRef | None, tuple[SourceSpec, ...]]:
    """The base that deltas are taken from, None for methods that take none, and the merged models."""
    return (piece.base if recipe.needs_base else None), recipe.terms(piece)


class _Part:
    """One module's tensors: those whose names begin with its prefix."""

    def __init__(self, recipe: Recipe, module: ModuleSpec, prefix: str, sources, ties, faults: list[str]):
        self.recipe, self.module, self.prefix = recipe, module, prefix
        self.sources, self.ties, self.faults = sources, ties, faults
        self.known = {model: {*source.tensors, *source.aliases} for model, source in sources.items()}

    def names(self, model: ModelRef) -> list[str]:
        """What the model has, tied names left out."""
        source = self.sources[model]
        return [n for n in (*source.tensors, *source.aliases) if n.startswith(self.prefix) and n not in self.ties]

    def lacks(self, model: ModelRef, name: str) -> bool:
        return name not in self.known[model]

    def assigned(self, name, base, models, piece: SliceSpec, position: float | None) -> Assignment:
        return Assignment(name, base, models, self.module, piece, position)

    def whole_models(self) -> Iterator[Assignment]:
        """Every tensor of the first model, with its equals by name in all others."""
        piece = self.module.slices[0]
        base, terms = _members(self.recipe, piece)
        models = [t.model for t in terms]
        donor = base or models[0]
        names = self.names(donor)
        if not names:
            self.faults.append(f"module {self.module.name!r}: no tensor's name begins with {self.prefix!r}")
        missing: set[str] = set()
        frozen: dict[ModelRef, set[str]] = {}
        for model in dict.fromkeys(m for m in models if m != donor):
            lacking = [n for n in names if n not in self.known[model]]
            if base and holds_trained_only(self.sources[model]):
                frozen[model], lacking = set(lacking), []
            self._compare_names(model, donor, lacking)
            missing.update(lacking)
        layers = [layer_of(name) for name in names]
        counts = _layer_counts(filter(None, layers))
        for name, layer in zip(names, layers, strict=True):
            if name not in missing:
                position = None if layer is None else _position(layer[1], counts[layer[0]])
                mine = (base, name) if base else None
                here = tuple((base if name in frozen.get(m, ()) else m, name) for m in models)
                moved = here if any(place != mine for place in here) else ()
                yield self.assigned(name, mine, moved, piece, position)

    def _compare_names(self, model: ModelRef, donor: ModelRef, lacking: list[str]) -> None:
        if lacking:
            self.faults.append(f"{model}: lacks {_some(lacking)}, which {donor} has")
        self._refuse_extra(model, donor, self.names(model))

    def _refuse_extra(self, model: ModelRef, donor: ModelRef, names: list[str]) -> None:
        """Names of a model that the donor lacks, unless it has the tensor by another name."""
        aliases = self.sources[model].aliases
        tied = {name for alias, stored in aliases.items() if not self.lacks(donor, alias) for name in (alias, stored)}
        extra = [n for n in names if n not in self.known[donor] and n not in tied]
        if extra:
            self.faults.append(f"{model}: has {_some(extra)}, which {donor} lacks")

    def stacked(self) -> Iterator[Assignment]:
        """Slices one upon the other: layers are numbered anew; what lies outside layers comes from the ends."""
        slices = self.module.slices
        yield from self._outside_layers(slices[0], before=True)
        done = 0
        for piece in slices:
            done += yield from self._layers_of(piece, done)
        yield from self._outside_layers(slices[-1], before=False)

    def _outside_layers(self, piece: SliceSpec, *, before: bool) -> Iterator[Assignment]:
        base, terms = _members(self.recipe, piece)
        donor = base or terms[0].model
        names = self.names(donor)
        path, _ = main_layers(names)
        for model in (t.model for t in terms if t.model != donor):
            self._refuse_extra(model, donor, [n for n in self.names(model) if _path(n) != path])
        for name in names:
            if _path(name) == path or any(part in name.lower() for part in BEFORE_LAYERS) != before:
                continue
            models = tuple((t.model, name) for t in terms)
            lacking = [m for m, n in models if self.lacks(m, n)]
            if lacking:
                self.faults.append(f"{lacking[0]}: lacks {name!r}, which {donor} has")
            else:
                yield self.assigned(name, (base, name) if base else None, models, piece, None)

    def _layers_of(self, piece: SliceSpec, done: int):
        """Yields the slice's layers, numbered from `done`; returns how many there are."""
        base, terms = _members(self.recipe, piece)
        begin, end = terms[0].layer_range
        firsts = {t.model: t.layer_range[0] for t in terms}
        if base:
            firsts = {base: self.recipe.base_source(piece).layer_range[0], **firsts}
        donor = base or terms[0].model
        path, layers = self._layers(donor)
        others = {m: self._layers(m)[1] for m in firsts if m != donor}
        for i in range(end - begin):
            layer = firsts[donor] + i
            if layer not in layers:
                self.faults.append(f"{donor}: has no layer {layer} under {path!r}, as layer_range asks")
            for model, theirs in others.items():
                here = f"{path}.{firsts[model] + i}"
                self._compare_layers(model, donor, here, theirs.get(firsts[model] + i, []), layers.get(layer, []))
            for rest in layers.get(layer, []):
                places = {m: (m, f"{path}.{first + i}.{rest}") for m, first in firsts.items()}
                if not any(self.lacks(*place) for place in places.values()):
                    models = tuple(places[t.model] for t in terms)
                    name, position = f"{path}.{done + i}.{rest}", _position(i, end - begin)
                    yield self.assigned(name, places.get(base), models, piece, position)
        return end - begin

    def _compare_layers(self, model, donor, path: str, theirs: list[str], wanted: list[str]) -> None:
        lacking = [f"{path}.{rest}" for rest in wanted if rest not in theirs]
        extra = [f"{path}.{rest}" for rest in theirs if rest not in wanted]
        if lacking:
            self.faults.append(f"{model}: lacks {_some(lacking)}, which {donor} has in that place")
        if extra:
            self.faults.append(f"{model}: has {_some(extra)}, which {donor} lacks in that place")

    def _layers(self, model: ModelRef) -> tuple[str, dict[int, list[str]]]:
        """The path of the model's layers, and by layer what its tensors are called after the number."""
        names = self.names(model)
        path, _ = main_layers(names)
        layers: dict[int, list[str]] = defaultdict(list)
        for found_path, layer, rest in filter(None, map(layer_of, names)):
            if found_path == path:
                layers[layer].append(rest)
        return path, layers


def _some(names: list[str]) -> str:
    return ", ".join(repr(n) for n in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _layer_counts(layers) -> dict[str, int]:
    """How many layers each path has."""
    counts: dict[str, int] = defaultdict(int)
    for path, layer, _ in layers:
        counts[path] = max(counts[path], layer + 1)
    return counts


def _position(layer: int, layers: int) -> float:
    return layer / (layers - 1) if layers > 1 else 1.0


def _require_all_covered(recipe: Recipe, sources, ties, faults: list[str]) -> None:
    """Every tensor of the first model must belong to a module."""
    prefixes = tuple(f"{module.name}." for module in recipe.modules)
    donor = sources[recipe.references()[0]]
    left = [n for n in (*donor.tensors, *donor.aliases) if not n.startswith(prefixes) and n not in ties]
    if left:
        faults.append(f"no module covers {_some(left)}")
