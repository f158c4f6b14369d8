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
                "optional": the base is no term, and need not be given
    MODELS      how many models it takes (default any number)
    MASKED      True: its `mask` key names a file of masks, handed to the kernel (default False)
    STATISTICS  ("gram",): inner products of the inputs, handed over in TensorSpec (default none); ("model-gram",):
                those of the task vectors, over all merged tensors
    SCOPE       {compat: "model"}: the trim scope that a compat name implies (default none)
    check(params, compat) -> list of complaints about combinations of keys
    needs(params) -> kinds of statistics it wants of every model for a tensor, as alternatives, the best first:
                (("input_gram", "output_gram"), ("fisher_gram",)). They come in TensorSpec.statistics, from the files
                that the per-model key `statistics` names; tensors that have none are averaged
    start(params) -> a checkpoint to begin from, None for none; its tensor comes in TensorSpec.start
    wants_base(params, compat) -> whether "optional" is not so with these settings
    memory(params, shape, models) -> bytes of working memory that `merge` takes beside its inputs
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


def per_model(
    default: Any,
    *,
    low: float | None = None,
    high: float | None = None,
    kind: type = float,
    alias: str = "",
    help: str = "",
):
    """A key that each model may set for itself. The resolved value is a tuple with one entry a model."""
    return _key(default, low, high, alias, help, per_model=True, kind=kind)


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
    statistics  one a model, when the method asks for them by `needs`
    start   the tensor of the checkpoint that `start` names
    notes   what a whole-tensor method has to say of the tensor goes into this dict, and from there into the report
    """

    name: str
    shape: tuple[int, ...]
    models: int
    compat: str = "native"
    scope: str = "tensor"
    trim_size: int = 0
    gram: Any = None
    statistics: tuple[TensorStatistics, ...] = ()
    start: Any = None
    notes: dict = dataclasses.field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class TensorStatistics:
    """What was collected for one tensor of one model; fp32 torch tensors, None for what was not asked for.

    input_gram   [in (in + 1) / 2]   mean of x x^T over the rows x that went into the layer, packed upper triangle
    output_gram  [out (out + 1) / 2] mean of g g^T over the gradients g of its output
    fisher       [*S]                mean of the squared gradient of the tensor, over examples
    fisher_gram  [n (n + 1) / 2]     mean of its outer product with itself, n elements
    transposed   whether the layer stores its weight [in, out]
    fisher_norm  of all `fisher` of the model together, 0 where the file does not say it
    collected    how, where it was not from the model as it is
    """

    input_gram: Any = None
    output_gram: Any = None
    fisher: Any = None
    fisher_gram: Any = None
    transposed: bool = False
    fisher_norm: float = 0.0
    collected: str = ""


KINDS = ("input_gram", "output_gram", "fisher", "fisher_gram")
"""Of statistics. The first two belong to a layer, `<module>.input_gram`, the others to a tensor, `<tensor>.fisher`."""


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


def needs_base(method: ModuleType) -> bool | str:
    """True, False, or "optional": the base is no term, but may be left out."""
    return getattr(method, "NEEDS_BASE", True)


def build(method: ModuleType, values: Mapping[str, Any]):
    """Params from resolved values, aliases allowed; unknown names are the caller's bug."""
    known = keys(method)
    return method.Params(**{known[k].name: v for k, v in values.items()})
