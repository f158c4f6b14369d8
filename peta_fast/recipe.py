"""Recipes: mergekit's YAML, or the same keys as a Python mapping, read into a frozen Recipe.

    models | slices | modules   what is merged, whole or layer by layer
    merge_method, base_model    how, and onto what
    parameters                  settings for all; those of a module, a slice, a model go before them
    dtype, out_dtype, tokenizer_source | tokenizer, chat_template
    name, compat, seed, trim_scope                                  ours; mergekit does not know them

Every fault of a recipe is reported at once, with its line and the nearest valid name.
Source: mergekit's recipes, which are read unchanged; their meaning was observed by running version 0.1.5.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from peta_fast import methods
from peta_fast._recipe_reader import IGNORED_PARAMETERS, IGNORED_PREFIX, LAYOUTS, RecipeReader
from peta_fast._recipe_settings import Condition, Setting, read_setting, setting_schema
from peta_fast._recipe_spec import (
    COMPAT_NAMES,
    DTYPES,
    TRIM_SCOPES,
    AdapterRef,
    ModelRef,
    ModuleSpec,
    Recipe,
    SliceSpec,
    SourceSpec,
)
from peta_fast._yaml_lines import (
    MAX_BYTES,
    MAX_INTEGER,
    Faults,
    Located,
    locate_documents,
    locate_mapping,
    nearest,
    shown,
)
from peta_fast.methods import Key

__all__ = [
    "COMPAT_NAMES", "DTYPES", "TRIM_SCOPES", "AdapterRef", "Condition", "ModelRef", "ModuleSpec", "Recipe", "Setting",
    "SliceSpec", "SourceSpec", "document_of", "edit_text", "load_recipe", "load_recipes", "read_value",
    "recipe_schema", "unknown_name",
]  # fmt: skip


def load_recipe(source: str | os.PathLike | Mapping | Recipe, *, compat: str | None = None) -> Recipe:
    """Reads one recipe.

    source  path of a YAML file, YAML text, or a mapping with the same keys; a Recipe comes back as it is
    compat  whose semantics apply, before what the recipe says. Without either: mergekit's for YAML that says
            `merge_method`, native for a mapping and for YAML that says `method`; where the method does not
            implement that, the first it does

    Raises RecipeError with all faults.
    """
    if isinstance(source, Recipe):
        return source
    faults = Faults()
    documents = _documents(source, faults)
    if len(documents) > 1:
        faults.abort(documents[1][0], f"begins the second of {len(documents)} documents, expected one recipe")
    recipe = RecipeReader(faults, isinstance(source, Mapping), compat).read(*documents[0])
    faults.raise_all()
    return recipe


def load_recipes(source: str | os.PathLike, *, compat: str | None = None) -> list[tuple[str, Recipe]]:
    """Reads every recipe of a YAML stream, as (name, recipe); a recipe without a name goes by its place, from "0".

    Raises RecipeError with all faults of all recipes.
    """
    faults = Faults()
    found: dict[str, Recipe] = {}
    for place, (root, text) in enumerate(_documents(source, faults)):
        recipe = RecipeReader(faults, False, compat).read(root, text)
        name = recipe.name or str(place)
        if name in found:
            faults.add(root, f"is a second recipe with the name '{name}'")
        found[name] = recipe
    faults.raise_all()
    return list(found.items())


def _documents(source: Any, faults: Faults) -> list[tuple[Located, str]]:
    """The documents of a source, at least one."""
    if isinstance(source, Mapping):
        root = locate_mapping(source, faults)
        return [(root, _dump(root))]
    if not isinstance(source, str | os.PathLike):
        faults.abort(Located(None, "recipe"), f"is a {type(source).__name__}, expected a path, YAML text or a mapping")
    if isinstance(source, str) and _is_text(source):
        label, text = "recipe", source
    else:
        label = _label(source)
        text = _file_text(source, label, faults)
    documents = locate_documents(text, label, faults)
    if not documents:
        faults.abort(Located(None, label), "is empty, expected a recipe in YAML")
    return documents


def _is_text(source: str) -> bool:
    if "\n" in source or source.lstrip().startswith("{"):
        return True
    return (": " in source or source.endswith(":")) and not os.path.isfile(source)


def _label(path: str | os.PathLike) -> str:
    """The path as messages name it; text that was meant to be YAML may have come here."""
    name = os.fspath(path)
    return name if isinstance(name, str) and name.isprintable() and 0 < len(name) < 300 else f"file {shown(name)}"


def _file_text(path: str | os.PathLike, label: str, faults: Faults) -> str:
    at = Located(None, label)
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        faults.abort(at, f"cannot be read as a recipe: {getattr(error, 'strerror', None) or error}")
    if len(content) > MAX_BYTES:
        faults.abort(at, f"is larger than {MAX_BYTES >> 20} MB, expected a recipe in YAML")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        faults.abort(at, "is not UTF-8 text, expected a recipe in YAML")


def _dump(root: Located) -> str:
    import yaml

    return yaml.safe_dump(_plain(root), sort_keys=False, allow_unicode=True)


def _plain(node: Located) -> Any:
    if isinstance(node.value, dict):
        return {key: _plain(member) for key, member in node.value.items()}
    if isinstance(node.value, list):
        return [_plain(member) for member in node.value]
    return node.value if isinstance(node.value, str | int | float | None) else str(node.value)


def document_of(source: str | os.PathLike) -> dict:
    """A path's or text's document as plain values, whatever is wrong with it as a recipe; empty where it is no mapping,
    or one of several."""
    documents = _documents(source, Faults())
    plain = _plain(documents[0][0]) if len(documents) == 1 else None
    return plain if isinstance(plain, dict) else {}


def edit_text(recipe: Recipe, edit: Callable[[dict], None]) -> str:
    """The recipe's text as YAML with its document changed by `edit`; comments are lost, aliases written out."""
    import yaml

    faults = Faults()
    document = _plain(locate_documents(recipe.text, recipe.name or "recipe", faults)[0][0])
    edit(document)
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True)


def read_value(value: Any, key: Key) -> Any:
    """One value of a method's key, checked as a recipe's is. Raises RecipeError."""
    faults = Faults()
    (condition,) = read_setting(Located(value, key.name), key, faults)
    faults.raise_all()
    return condition.values[0]


def unknown_name(word: str, names: Iterable[str]) -> str:
    """The end of a sentence about an unknown word: the nearest name, or all of them."""
    return nearest(word, tuple(names))


def recipe_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of recipes, with the keys of every method in the methods folder.

    What it cannot say is left to load_recipe: required keys that another level may give, equal numbers of layers.
    """
    text, mapping = _nullable("string"), _nullable("object")
    spelled = {"type": "string", "minLength": 1}
    reference = {"anyOf": [spelled, {"type": "array", "items": spelled, "minItems": 1}]}
    model = _object({"model": reference, "parameters": mapping}, required=["model"])
    layers = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 2, "maxItems": 2}
    source = _object({**model["properties"], "layer_range": layers}, required=["model", "layer_range"])
    sources = {"type": "array", "items": {"$ref": "#/$defs/source"}, "minItems": 1}
    slice_ = _object({"sources": sources, "base_model": text, "parameters": mapping}, required=["sources"])
    models = {"type": "array", "items": {"$ref": "#/$defs/model"}, "minItems": 1}
    slices = {"type": "array", "items": {"$ref": "#/$defs/slice"}, "minItems": 1}
    module = _object({"models": models, "slices": slices, "parameters": mapping})
    module["oneOf"] = [{"required": ["models"]}, {"required": ["slices"]}]
    dtype = {"enum": [*DTYPES, "auto", None]}
    top = {
        "merge_method": {"enum": list(methods.names())},
        "method": {"enum": list(methods.names())},
        "base_model": text,
        "models": models,
        "slices": slices,
        "modules": {"type": "object", "additionalProperties": {"$ref": "#/$defs/module"}, "minProperties": 1},
        "parameters": mapping,
        "dtype": dtype,
        "out_dtype": dtype,
        "tokenizer_source": {**text, "not": {"const": "union"}},
        "tokenizer": {**_object({"source": {**text, "not": {"const": "union"}}}), "type": ["object", "null"]},
        "chat_template": text,
        "name": text,
        "compat": {"enum": [*COMPAT_NAMES, None]},
        "seed": {"type": ["integer", "null"], "minimum": 0, "exclusiveMaximum": MAX_INTEGER},
        "trim_scope": {"enum": [*TRIM_SCOPES, None]},
    }
    definitions = {"model": model, "source": source, "slice": slice_, "module": module}
    for name in methods.names():
        definitions.update(_method_parameters(name))
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "peta_fast recipe",
        **_object(top),
        "patternProperties": {f"^{IGNORED_PREFIX}": True},
        "allOf": [
            {"oneOf": [{"required": ["merge_method"]}, {"required": ["method"]}]},
            {"oneOf": [{"required": [layout]} for layout in LAYOUTS]},
            *(_method_schema(name) for name in methods.names()),
        ],
        "$defs": definitions,
    }


def _nullable(kind: str) -> dict[str, Any]:
    return {"type": [kind, "null"]}


def _object(properties: dict[str, Any], required: list[str] | None = None) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties, "additionalProperties": False}
    return {**schema, "required": required} if required else schema


def _method_parameters(name: str) -> dict[str, Any]:
    """What stands under `parameters` where the method is `name`: for all models, and for one model."""
    keys = methods.keys(methods.get(name))
    ignored: dict[str, Any] = {spelled: True for spelled in IGNORED_PARAMETERS}
    shared = {**ignored, **{spelled: setting_schema(key) for spelled, key in keys.items()}}
    per_model = {**ignored, **{spelled: shared[spelled] for spelled, key in keys.items() if key.per_model}}
    return {
        f"{name}.parameters": {"properties": shared, "additionalProperties": False},
        f"{name}.model_parameters": {"properties": per_model, "additionalProperties": False},
    }


def _method_schema(name: str) -> dict[str, Any]:
    """Where the method is `name`, which parameters stand at each level."""

    def level(parameters: str, **members: Any) -> dict[str, Any]:
        return {"properties": {"parameters": {"$ref": f"#/$defs/{name}.{parameters}"}, **members}}

    models = {"items": level("model_parameters")}
    slices = {"items": level("parameters", sources=models)}
    modules = {"additionalProperties": level("parameters", models=models, slices=slices)}
    spelled = [{"properties": {key: {"const": name}}, "required": [key]} for key in ("merge_method", "method")]
    return {"if": {"anyOf": spelled}, "then": level("parameters", models=models, slices=slices, modules=modules)}
