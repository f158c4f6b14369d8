"""Reads the located tree of a recipe into a Recipe, gathering every fault on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import ModuleType

from peta_fast import methods
from peta_fast._recipe_settings import Setting, read_setting
from peta_fast._recipe_spec import (
    COMPAT_NAMES,
    DTYPES,
    TRIM_SCOPES,
    ModelRef,
    ModuleSpec,
    Recipe,
    SliceSpec,
    SourceSpec,
    terms_of,
)
from peta_fast._yaml_lines import Faults, Located, close_name, closest, listed, nearest, shown
from peta_fast.methods import Key

LAYOUTS = ("models", "slices", "modules")
TOP_KEYS = (
    "merge_method", "method", "base_model", *LAYOUTS, "parameters", "dtype", "out_dtype",
    "tokenizer_source", "tokenizer", "chat_template", "name", "compat", "seed", "trim_scope",
)  # fmt: skip
MODULE_KEYS = ("models", "slices", "parameters")
SLICE_KEYS = ("sources", "base_model", "parameters")
SOURCE_KEYS = ("model", "layer_range", "parameters")
MODEL_KEYS = ("model", "parameters")
TOKENIZER_KEYS = ("source", "tokens", "pad_to_multiple_of")

IGNORED_PARAMETERS = ("int8_mask",)
"""Keys of mergekit that save memory there and change no result: accepted at every level, without effect."""
IGNORED_PREFIX = "x-"
"""Top-level keys that begin so hold the author's anchors and notes."""

Fields = Mapping[str, Located]
Levels = Sequence[Mapping[str, Setting]]


class RecipeReader:
    """Reads a located tree into a Recipe; whatever is wrong goes to faults, and then the Recipe is not to be used."""

    def __init__(self, faults: Faults, from_mapping: bool, compat: str | None):
        self.faults, self.from_mapping, self.compat = faults, from_mapping, compat
        self.method_name = ""
        self.method: ModuleType | None = None
        self.keys: Mapping[str, Key] = {}
        self.base: ModelRef | None = None
        self.method_place = self.base_place = Located(None, "recipe")

    def read(self, root: Located, text: str) -> Recipe:
        top = self._fields(root, TOP_KEYS, "a recipe")
        self._read_method(root, top)
        self.base = self._model(top.get("base_model"), "base_model")
        self.base_place = top.get("base_model", root)
        parameters = self._parameters(top.get("parameters"))
        compat = self._compat(top.get("compat"), "method" in top)
        return Recipe(
            method=self.method_name,
            base=self.base,
            modules=self._modules(root, top, parameters),
            parameters=parameters,
            dtype=self._choice(top.get("dtype"), "dtype", DTYPES, absent="auto"),
            out_dtype=self._choice(top.get("out_dtype"), "out_dtype", DTYPES, absent="auto"),
            compat=compat,
            seed=self._seed(top.get("seed")),
            trim_scope=self._choice(top.get("trim_scope"), "trim_scope", TRIM_SCOPES) or self._implied_scope(compat),
            tokenizer_source=self._tokenizer(top),
            chat_template=self._text(top.get("chat_template"), "chat_template"),
            text=text,
            name=self._text(top.get("name"), "name"),
        )

    # Fields of any mapping

    def _fields(self, node: Located, allowed: Sequence[str], what: str) -> dict[str, Located]:
        """The members of a mapping that are known and not empty."""
        if not isinstance(node.value, dict):
            self.faults.add(node, f"{what} is {shown(node.value)}, expected a mapping with {listed(allowed, 'or')}")
            return {}
        for name, member in node.value.items():
            if name in allowed or (allowed is TOP_KEYS and name.startswith(IGNORED_PREFIX)):
                continue
            hint = "; it belongs under 'parameters'" if name in self.keys else nearest(name, allowed)
            self.faults.add(member, f"{shown(name)} is not a key of {what}{hint}")
        return {name: node.value[name] for name in allowed if name in node.value and node.value[name].value is not None}

    def _list(self, node: Located | None, what: str) -> list[Located]:
        if node is None:
            return []
        if isinstance(node.value, list) and node.value:
            return node.value
        got = "an empty list" if isinstance(node.value, list) else shown(node.value)
        self.faults.add(node, f"'{what}' is {got}, expected a list of at least one entry")
        return []

    def _text(self, node: Located | None, what: str) -> str | None:
        if node is None:
            return None
        if isinstance(node.value, str) and node.value.strip():
            return node.value
        quotes = "; put it in quotes" if isinstance(node.value, int | float) else ""
        self.faults.add(node, f"'{what}' is {shown(node.value)}, expected text{quotes}")
        return None

    def _choice(self, node: Located | None, what: str, names: Sequence[str], absent: str = "") -> str | None:
        text = self._text(node, what)
        if node is None or text is None or text == absent:
            return None
        if text not in names:
            hint = closest(text, names)
            self.faults.add(node, f"'{what}' is {shown(text)}, expected {listed(names, 'or')}{hint}")
        return text

    # Top-level keys

    def _read_method(self, root: Located, top: Fields) -> None:
        self.method_place = node = top.get("merge_method") or top.get("method") or root
        if "merge_method" in top and "method" in top:
            self.faults.add(top["method"], "'method' and 'merge_method' are two names of one key; remove one")
        if node is root:
            self.faults.add(root, "has no 'merge_method'")
            return
        self.method_name = self._text(node, "merge_method") or ""
        if self.method_name in methods.names():
            self.method = methods.get(self.method_name)
            self.keys = methods.keys(self.method)
        elif self.method_name:
            hint = nearest(self.method_name, methods.names())
            self.faults.add(node, f"{shown(self.method_name)} is not a merge method{hint}")

    def _compat(self, node: Located | None, own_spelling: bool) -> str:
        implemented = self.method.COMPAT if self.method else COMPAT_NAMES
        given = self.compat or self._text(node, "compat")
        if given is None:
            implied = "native" if self.from_mapping or own_spelling else "mergekit"
            return implied if implied in implemented else implemented[0]
        place = Located(None, "compat") if self.compat or node is None else node
        if given not in COMPAT_NAMES:
            self.faults.add(place, f"{shown(given)} names no semantics{nearest(given, COMPAT_NAMES)}")
        elif given not in implemented:
            self.faults.add(place, f"{self.method_name} does not implement '{given}', only {listed(implemented)}")
        return given

    def _implied_scope(self, compat: str) -> str:
        return getattr(self.method, "SCOPE", {}).get(compat, "tensor")

    def _seed(self, node: Located | None) -> int:
        if node is None:
            return 0
        if isinstance(node.value, int) and not isinstance(node.value, bool) and node.value >= 0:
            return node.value
        self.faults.add(node, f"'seed' is {shown(node.value)}, expected an integer from 0 to 2^64 - 1")
        return 0

    def _tokenizer(self, top: Fields) -> str | None:
        if "tokenizer" not in top:
            return self._tokenizer_source(top.get("tokenizer_source"), "tokenizer_source")
        if "tokenizer_source" in top:
            self.faults.add(top["tokenizer"], "'tokenizer' and 'tokenizer_source' exclude each other; remove one")
        fields = self._fields(top["tokenizer"], TOKENIZER_KEYS, "'tokenizer'")
        for name in ("tokens", "pad_to_multiple_of"):
            if name in fields:
                self._refuse_surgery(fields[name], f"tokenizer.{name}")
        return self._tokenizer_source(fields.get("source"), "tokenizer.source")

    def _tokenizer_source(self, node: Located | None, what: str) -> str | None:
        if node is not None and node.value == "union":
            self._refuse_surgery(node, f"{what}: union")
            return None
        if node is not None and node.value == "base":
            return "base"
        model = self._model(node, what)
        return str(model) if model else None

    def _refuse_surgery(self, node: Located, what: str) -> None:
        self.faults.add(
            node,
            f"'{what}' needs embedding surgery, which is not available yet; "
            "remove it to keep the base model's tokenizer and embeddings",
        )

    # What is merged

    def _modules(self, root: Located, top: Fields, outer: Mapping[str, Setting]) -> tuple[ModuleSpec, ...]:
        layout = self._layout(root, top, LAYOUTS)
        if layout is None:
            return ()
        if layout != "modules":
            return (ModuleSpec("", self._slices(layout, top, [outer]), {}),)
        modules = top["modules"]
        if not isinstance(modules.value, dict) or not modules.value:
            self.faults.add(modules, f"'modules' is {shown(modules.value)}, expected a mapping of names to modules")
            return ()
        return tuple(self._module(name, node, outer) for name, node in modules.value.items())

    def _module(self, name: str, node: Located, outer: Mapping[str, Setting]) -> ModuleSpec:
        fields = self._fields(node, MODULE_KEYS, f"module {shown(name)}")
        parameters = self._parameters(fields.get("parameters"))
        layout = self._layout(node, fields, MODULE_KEYS[:2]) if isinstance(node.value, dict) else None
        return ModuleSpec(name, self._slices(layout, fields, [parameters, outer]) if layout else (), parameters)

    def _layout(self, node: Located, fields: Fields, layouts: Sequence[str]) -> str | None:
        given = [layout for layout in layouts if layout in fields]
        if len(given) != 1:
            at = fields[given[1]] if given else node
            got = listed(given) if given else "none"
            self.faults.add(at, f"expected exactly one of {listed(layouts)}, got {got}")
        return given[0] if given else None

    def _slices(self, layout: str, fields: Fields, outer: Levels) -> tuple[SliceSpec, ...]:
        node = fields[layout]
        if layout == "slices":
            return tuple(self._slice(member, outer) for member in self._list(node, "slices"))
        sources = self._sources(node, "models", MODEL_KEYS)
        piece = SliceSpec(tuple(source for source, _ in sources), self.base, {})
        self._check_slice(node, piece, [place for _, place in sources], outer, self.base_place)
        return (piece,)

    def _slice(self, node: Located, outer: Levels) -> SliceSpec:
        fields = self._fields(node, SLICE_KEYS, "a slice")
        parameters = self._parameters(fields.get("parameters"))
        base = self._model(fields.get("base_model"), "base_model") or self.base
        sources = []
        if "sources" in fields:
            sources = self._sources(fields["sources"], "sources", SOURCE_KEYS)
        elif isinstance(node.value, dict):
            self.faults.add(node, "this slice has no 'sources'")
        piece = SliceSpec(tuple(source for source, _ in sources), base, parameters)
        base_place = fields.get("base_model", self.base_place)
        self._check_layer_ranges(node, piece)
        self._check_slice(node, piece, [place for _, place in sources], [parameters, *outer], base_place)
        return piece

    def _sources(self, node: Located, what: str, allowed: Sequence[str]) -> list[tuple[SourceSpec, Located]]:
        """The models of a slice with their places, those left out whose name cannot be read."""
        found: dict[ModelRef, tuple[SourceSpec, Located]] = {}
        for member in self._list(node, what):
            fields = self._fields(member, allowed, f"an entry of '{what}'")
            if isinstance(member.value, dict) and "model" not in fields:
                self.faults.add(member, f"this entry of '{what}' has no 'model'")
            model = self._model(fields.get("model"))
            parameters = self._parameters(fields.get("parameters"), of_model=True)
            layer_range = self._layer_range(member, fields) if "layer_range" in allowed else None
            if model in found:
                self.faults.add(member, f"model '{model}' is listed twice; list it once, with the sum of its weights")
            elif model is not None:
                found[model] = SourceSpec(model, layer_range, parameters), member
        return list(found.values())

    def _model(self, node: Located | None, what: str = "model") -> ModelRef | None:
        if node is not None and isinstance(node.value, list):
            parts = [self._text(member, what) for member in self._list(node, what)]
            text = None if None in parts or not parts else "+".join(parts)
        else:
            text = self._text(node, what)
        if node is None or text is None:
            return None
        try:
            return ModelRef.parse(text)
        except ValueError as error:
            form = "model[@revision][+adapter[@revision][*weight]]..."
            self.faults.add(node, f"'{what}' is {shown(text)}, expected {form}, got {error}")
            return None

    def _layer_range(self, source: Located, fields: Fields) -> tuple[int, int] | None:
        node = fields.get("layer_range")
        if node is None:
            if fields:
                self.faults.add(source, "this source has no 'layer_range', which every source of a slice needs")
            return None
        ends = [member.value for member in node.value] if isinstance(node.value, list) else []
        if len(ends) == 2 and all(type(end) is int for end in ends) and 0 <= ends[0] < ends[1]:
            return ends[0], ends[1]
        got = f"[{', '.join(map(shown, ends))}]" if 0 < len(ends) < 4 else shown(node.value)
        self.faults.add(node, f"'layer_range' is {got}, expected [first, end] with 0 <= first < end")
        return None

    def _parameters(self, node: Located | None, of_model: bool = False) -> dict[str, Setting]:
        if node is None or self.method is None:
            return {}
        if not isinstance(node.value, dict):
            self.faults.add(node, f"'parameters' is {shown(node.value)}, expected a mapping")
            return {}
        found: dict[str, Setting] = {}
        spelled: dict[str, str] = {}
        for name, member in node.value.items():
            key = self.keys.get(name)
            if name in IGNORED_PARAMETERS:
                continue
            if key is None:
                self._refuse_parameter(name, member, found)
            elif of_model and not key.per_model:
                self.faults.add(member, f"'{name}' holds for all models: it belongs under the top-level 'parameters'")
            elif key.name in spelled:
                self.faults.add(member, f"'{name}' and '{spelled[key.name]}' are two names of one key; remove one")
            elif member.value is not None or key.default is not None:
                spelled[key.name] = name
                found[key.name] = read_setting(member, replace(key, name=name), self.faults)
        return found

    def _refuse_parameter(self, name: str, node: Located, found: dict[str, Setting]) -> None:
        """A name that is close to a key counts as that key, so that the key is not reported as missing too."""
        self.faults.add(node, f"{shown(name)} is not a key of {self.method_name}{nearest(name, tuple(self.keys))}")
        meant = close_name(name, self.keys)
        if meant:
            found.setdefault(self.keys[meant].name, ())

    # What a slice must have

    def _check_layer_ranges(self, node: Located, piece: SliceSpec) -> None:
        ranges = {source.layer_range for source in piece.sources if source.layer_range}
        lengths = sorted({end - first for first, end in ranges})
        if len(lengths) > 1:
            self.faults.add(node, f"its sources have {listed(map(str, lengths))} layers, expected the same number")
        elif len(ranges) > 1 and self._differences() and piece.base and piece.base not in _models(piece):
            problem = f"its sources have different layers, and base_model '{piece.base}' is not among them"
            self.faults.add(node, f"{problem}; list it with the layers that go with theirs")

    def _check_slice(
        self, node: Located, piece: SliceSpec, places: Sequence[Located], outer: Levels, base_place: Located
    ) -> None:
        if self.method is None or not piece.sources:
            return
        if methods.needs_base(self.method) is True and piece.base is None:
            self.faults.add(self.method_place, f"{self.method_name} needs a 'base_model'")
        terms = terms_of(piece, self._differences())
        takes = getattr(self.method, "MODELS", None)
        if not terms:
            self.faults.add(node, f"lists the base model '{piece.base}' alone; there is nothing to merge into it")
        elif takes is not None and len(terms) != takes:
            self.faults.add(node, f"{self.method_name} merges exactly {takes} models, got {len(terms)}")
        place_of = {source.model: place for source, place in zip(piece.sources, places, strict=True)}
        for key in methods.keys(self.method).values():
            if not key.required or any(key.name in level for level in outer):
                continue
            if not key.per_model:
                self.faults.add(self.method_place, f"{self.method_name} needs '{key.name}' under 'parameters'")
                continue
            for term in terms:
                if key.name not in term.parameters:
                    problem = f"model '{term.model}' has no '{key.name}', which {self.method_name} needs"
                    self.faults.add(place_of.get(term.model, base_place), problem)

    def _differences(self) -> bool:
        return self.method is not None and bool(methods.needs_base(self.method))


def _models(piece: SliceSpec) -> set[ModelRef]:
    return {source.model for source in piece.sources}
