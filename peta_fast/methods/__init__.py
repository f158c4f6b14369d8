"""Merge methods: one file each, found by looking into this folder.

A method file defines

    REFERENCE   address of the paper
    COMPAT      the semantics it implements, a tuple out of recipe.COMPAT_NAMES; the first is its default
    Params      frozen dataclass of its recipe keys, made of `per_model(...)` and `shared(...)` fields

and one of

    lower(params, tensor) -> DeltaMerge            element-wise: data for the one fused kernel
    merge(base, models, params, tensor) -> Tensor  whole-tensor: plain PyTorch, one tensor at a time

`tensor` is a TensorSpec. A method may also define

    NEEDS_BASE  False: merges the models as they are, the base among them if listed (default True)
    MODELS      how many models it takes (default any number)
    MASKED      True: its `mask` key names a file of masks, handed to the kernel (default False)
    STATISTICS  ("gram",): inner products of the inputs, handed over in TensorSpec (default none); ("model-gram",):
                those of the task vectors, over all merged tensors
    SCOPE       {compat: "model"}: the trim scope that a compat name implies (default none)
    check(params, compat) -> list of complaints about combinations of keys
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass
from types import ModuleType
from typing import Any

REQUIRED = object()
"""Default of a key that a recipe must give."""


def per_model(default: Any, *, low: float | None = None, high: float | None = None, alias: str = "", help: str = ""):
    """A key that each model may set for itself. The resolved value is a tuple with one entry a model."""
    return _key(default, low, high, alias, help, per_model=True, kind=float)


def shared(
    default: Any,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: Sequence[str] = (),
    kind: type | None = None,
    alias: str = "",
    help: str = "",
):
    """A key with one value for all models of a tensor. kind defaults to the default's type."""
    return _key(default, low, high, alias, help, per_model=False, choices=tuple(choices), kind=kind or type(default))


def _key(default, low, high, alias, help, **metadata):
    metadata.update(low=low, high=high, alias=alias, help=help, default=default)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class MethodParams:
    """Base of every method's Params: the keys all methods share. Values are those of one tensor, already resolved."""


@dataclass(frozen=True)
class TensorSpec:
    """What a method may know about the tensor it lowers.

    name    of the output tensor
    shape   of the tensor, row-major
    models  number of models merged, the base not counted
    compat  whose semantics apply
    scope   the trim scope: "tensor", "row-block" (each index of the first of three dimensions) or "model"
    trim_size  elements of one trim scope
    gram    [T, T] fp64 inner products, when the method asks for them by STATISTICS
    """

    name: str
    shape: tuple[int, ...]
    models: int
    compat: str = "native"
    scope: str = "tensor"
    trim_size: int = 0
    gram: Any = None


@dataclass(frozen=True)
class Key:
    """One recipe key of a method, as declared by a field of its Params."""

    name: str
    default: Any
    per_model: bool
    kind: type
    low: float | None
    high: float | None
    choices: tuple[str, ...]
    alias: str
    help: str

    @property
    def required(self) -> bool:
        return self.default is REQUIRED


def keys(method: ModuleType) -> dict[str, Key]:
    """The recipe keys of a method, by name and by alias."""
    found: dict[str, Key] = {}
    for f in dataclasses.fields(method.Params):
        m = f.metadata
        default = m.get("default", None if f.default is MISSING else f.default)
        key = Key(
            f.name, default, m["per_model"], m["kind"], m["low"], m["high"], m.get("choices", ()), m["alias"], m["help"]
        )
        found[f.name] = key
        if key.alias:
            found[key.alias] = key
    return found


@functools.cache
def names() -> tuple[str, ...]:
    """All method names, sorted."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")))


def get(name: str) -> ModuleType:
    """The method's module. KeyError when there is no such file; the caller knows how to say it."""
    if name not in names():
        raise KeyError(name)
    return importlib.import_module(f"{__name__}.{name}")


def needs_base(method: ModuleType) -> bool:
    return getattr(method, "NEEDS_BASE", True)


def build(method: ModuleType, values: Mapping[str, Any]):
    """Params from resolved values, aliases allowed; unknown names are the caller's bug."""
    known = keys(method)
    return method.Params(**{known[k].name: v for k, v in values.items()})
