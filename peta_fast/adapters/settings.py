"""How adapters are merged: method, space, rank, and the weights of every adapter in every layer.

    models: | adapters:   the adapters, each with `model:` and its `parameters:`, as in any recipe
    method | merge_method cat, svd, linear, knots, or an element-wise method of the methods folder
    rank, space, inner    ours; everything else is a recipe's: parameters, compat, seed, gradients, filters

Weights resolve as in recipes: one value, a gradient over the layers, or values with filters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from peta_fast import methods
from peta_fast._assignment import layer_of
from peta_fast.errors import RecipeError
from peta_fast.recipe import Recipe, load_recipe

FACTORED = ("cat", "knots", "linear", "svd")
"""Methods that live on factors alone; the others are files of the methods folder."""
SPACES = ("delta", "factors", "phi")
INNER = "ties"
NO_BASE = "(no base)"


@dataclass(frozen=True)
class Settings:
    """What holds for a whole merge.

    method  as asked for
    space   delta: entries of B A; factors: entries of A and of B, as PEFT; phi: steps of linearized adapters
    rank    of the result, None where the method decides
    inner   the element-wise method that is run: the method itself, that inside knots, or task_arithmetic
    recipe  of the inner method, with all adapters as its models
    """

    method: str
    space: str
    rank: int | None
    inner: str
    recipe: Recipe
    adapters: tuple[str, ...]

    @property
    def is_sum(self) -> bool:
        """Whether the result is a weighted sum of the changes: of low rank as it is."""
        return self.method in ("cat", "svd") or (self.method == "task_arithmetic" and self.space == "delta")

    def resolver(self, tensors: Sequence[str]) -> Resolver:
        return Resolver(self.recipe, tensors)


class Resolver:
    """The keys of the inner method for each tensor; layers are counted over all tensors of all adapters."""

    def __init__(self, recipe: Recipe, tensors: Sequence[str]):
        self.recipe = recipe
        self.module = recipe.modules[0]
        self.counts: dict[str, int] = {}
        for path, layer, _ in filter(None, map(layer_of, tensors)):
            self.counts[path] = max(self.counts.get(path, 0), layer + 1)

    def values(self, tensor: str) -> dict[str, Any]:
        found = layer_of(tensor)
        position = None
        if found:
            count = self.counts.get(found[0], found[1] + 1)
            position = found[1] / (count - 1) if count > 1 else 1.0
        return self.recipe.resolve(tensor, self.module, self.module.slices[0], position)


def read_settings(
    source: str | Path | Mapping[str, Any] | Sequence[str | Path],
    *,
    method: str | None = None,
    rank: int | None = None,
    space: str | None = None,
    inner: str | None = None,
    weights: Sequence[Any] | None = None,
    compat: str | None = None,
    seed: int = 0,
    parameters: Mapping[str, Any] | None = None,
) -> Settings:
    """From a recipe (path or mapping) or a list of adapters and keywords. Raises RecipeError for what does not fit."""
    if isinstance(source, (str, Path, Mapping)):
        given = dict(source) if isinstance(source, Mapping) else _load(source)
        clash = [k for k, v in {"method": method, "weights": weights, **(parameters or {})}.items() if v is not None]
        if clash:
            raise RecipeError("adapter merge", f"got a recipe and {', '.join(clash)}", "Give them in the recipe.")
        method = given.pop("merge_method", None) or given.pop("method", None)
        given.pop("method", None)
        rank = given.pop("rank", rank) if rank is None else rank
        space, inner = space or given.pop("space", None), inner or given.pop("inner", None)
        for key in ("rank", "space", "inner"):
            given.pop(key, None)
        models = [_entry(member) for member in _listed(given)]
    else:
        models = [{"model": str(path)} for path in source]
        given = {"seed": seed, "parameters": dict(parameters or {})}
        _give_weights(models, weights)
    return _checked(given, models, method or "svd", rank, space, inner, compat)


def _load(path: str | Path) -> dict[str, Any]:
    import yaml

    from peta_fast._yaml_lines import Faults, locate_documents

    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(str(path), f"cannot be read as a recipe: {error}") from error
    faults = Faults()
    documents = locate_documents(text, str(path), faults)
    faults.raise_all()
    if len(documents) > 1:
        raise RecipeError(str(path), f"expected one recipe, got {len(documents)} between ---", "Merge them one by one.")
    found = yaml.safe_load(text)
    if not isinstance(found, dict):
        raise RecipeError(str(path), f"expected a mapping, got {type(found).__name__}")
    return found


def _listed(given: dict[str, Any]) -> list:
    """The adapters of a recipe, taken out of it. Raises RecipeError for what is no list, or has no mappings below."""
    listed = given.pop("adapters", None) or given.pop("models", None) or []
    if not isinstance(listed, list | tuple):
        raise RecipeError("adapters", f"expected a list of adapters, got {listed!r}")
    for who, holder in (("parameters", given), *((f"adapters[{i}].parameters", m) for i, m in enumerate(listed))):
        parameters = holder.get("parameters") if isinstance(holder, Mapping) else None
        if parameters is not None and not isinstance(parameters, Mapping):
            raise RecipeError(who, f"expected a mapping, got {parameters!r}")
    return list(listed)


def _entry(member: Any) -> dict[str, Any]:
    if isinstance(member, dict) and "adapter" in member and "model" not in member:
        member = {"model": member["adapter"], **{k: v for k, v in member.items() if k != "adapter"}}
    return member if isinstance(member, dict) else {"model": member}


def _give_weights(models: list[dict[str, Any]], weights: Sequence[Any] | None) -> None:
    if weights is None:
        return
    if len(weights) != len(models):
        raise RecipeError("weights", f"expected {len(models)}, one an adapter, got {len(weights)}")
    for model, weight in zip(models, weights, strict=True):
        model["parameters"] = {"weight": weight}


def _checked(given: dict, models: list, method: str, rank, space, inner, compat) -> Settings:
    if not models:
        raise RecipeError("adapter merge", "got no adapters", "Name at least one adapter's folder.")
    known = sorted({*FACTORED, *filter(_is_element_wise, methods.names())})
    if method not in known:
        raise RecipeError("method", f"expected one of {', '.join(known)}, got {method!r}{_nearest(method, known)}")
    if rank is not None and (type(rank) is not int or rank < 1):
        raise RecipeError("rank", f"expected an integer of at least 1, got {rank!r}")
    space = space or "delta"
    if space not in SPACES:
        raise RecipeError("space", f"expected one of {', '.join(SPACES)}, got {space!r}")
    if method in FACTORED and space != "delta":
        raise RecipeError("space", f"{method} has no space to choose, got {space!r}")
    if rank is not None and (method in ("cat", "linear") or space != "delta"):
        what = method if space == "delta" else f"space {space!r}"
        raise RecipeError("rank", f"{what} decides the rank itself, got {rank}", "Use svd, or leave the rank out.")
    if inner is not None and method != "knots":
        raise RecipeError("inner", f"belongs to knots, got it with {method}")
    core = (inner or INNER) if method == "knots" else "task_arithmetic" if method in FACTORED else method
    if not (core in methods.names() and _is_element_wise(core)):
        raise RecipeError("inner", f"expected an element-wise method, got {core!r}")
    return Settings(method, space, rank, core, _recipe(given, models, core, method, space, compat), _names(models))


def _recipe(given: dict, models: list, core: str, method: str, space: str, compat: str | None) -> Recipe:
    """The inner method's recipe; every adapter has the weight 1 unless it, or the recipe, says otherwise."""
    shared = dict(given.get("parameters") or {})
    if "weight" not in shared:
        models = [{**m, "parameters": {"weight": 1.0, **(m.get("parameters") or {})}} for m in models]
    implemented = methods.get(core).COMPAT
    if compat is None and given.get("compat") is None:
        if space == "factors" and "peft" in implemented:
            compat = "peft"
        elif method == "knots" and core == "ties":
            density = shared.get("density", 1.0)
            compat = "ties-authors" if isinstance(density, int | float) and density < 1 else "peta"
    if method == "knots" and core == "ties" and "density" not in shared:
        shared["density"] = 0.2
        compat = compat if compat not in (None, "peta") or given.get("compat") else "ties-authors"
    spelled = {**given, "method": core, "base_model": NO_BASE, "models": models, "parameters": shared}
    return load_recipe(spelled, compat=compat)


def _names(models: list) -> tuple[str, ...]:
    return tuple(str(m["model"]) for m in models)


def _is_element_wise(name: str) -> bool:
    module: ModuleType = methods.get(name)
    return hasattr(module, "lower") and methods.needs_base(module) and not getattr(module, "MASKED", False)


def _nearest(name: str, known: Sequence[str]) -> str:
    import difflib

    near = difflib.get_close_matches(str(name), known, 1)
    return f"; did you mean {near[0]!r}?" if near else ""
