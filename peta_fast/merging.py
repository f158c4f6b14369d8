"""The verbs: merge checkpoints on disk, merge state dicts in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from peta_fast._assignment import kept_ties
from peta_fast._beside import Beside
from peta_fast._engine import Engine, Piece
from peta_fast._tensor_plan import TensorPlan, runs_of
from peta_fast.buffers import ITEMSIZE, LONG_NAMES, SHORT_NAMES, Buffer
from peta_fast.errors import CompatibilityError, RecipeError
from peta_fast.formats import open_checkpoint
from peta_fast.formats.trained_only import METADATA, TrainedTensors
from peta_fast.ops import backend
from peta_fast.plan import make_plan, plan_tensors
from peta_fast.recipe import ModelRef, Recipe, load_recipe
from peta_fast.run import Progress, Report, run

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
         "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}  # fmt: skip
BATCH = 1 << 24
"""Elements merged in one call in memory."""
DEVICE_BATCH = 1 << 28
"""The same on a device, whose scratch is a few percent of that."""


def parse_bytes(text: str | int | float, who: str) -> int:
    """A number of bytes: 768MB, 5GB, 1GiB, 1000000. Raises RecipeError naming `who`."""
    digits = str(text).strip().rstrip("BbKkMmGgTtIi ")
    unit = str(text).strip()[len(digits) :].strip().upper()
    try:
        number = float(digits)
    except ValueError:
        number = -1.0
    if unit not in UNITS or not 0 < number < 1e18:
        raise RecipeError(who, f"expected a number of bytes such as 768MB, 5GB or 1GiB, got {text!r}")
    return int(number * UNITS[unit])


def merge(
    recipe: str | Path | Mapping[str, Any] | Recipe | None = None,
    out: str | Path | None = None,
    *,
    method: str | None = None,
    base: str | Path | None = None,
    models: Sequence[str | Path] | None = None,
    compat: str | None = None,
    max_memory: str | int = "768MB",
    max_shard_size: str | int = "5GB",
    threads: int = 0,
    resume: bool = False,
    force: bool = False,
    allow_nonfinite: bool = False,
    trained_only: bool = False,
    device: str = "cpu",
    progress: Callable[[Progress], None] | None = None,
    **parameters: Any,
) -> Report:
    """Merges checkpoints into the folder `out`, as `peta-fast merge` does: by a recipe, or by keywords.

        merge("recipe.yml", "merged")
        merge(out="merged", method="ties", base="base", models=["a", "b"], weight=[0.5, 0.7], density=0.2)

    recipe      path of a mergekit YAML, its text, a mapping with the same keys, or a loaded Recipe
    method, base, models   instead of a recipe: folders, weight files or hub ids
    parameters  then, the method's keys - one value, or for keys that each model sets, a list with one a model - and
                the recipe's: seed, dtype, out_dtype, trim_scope, tokenizer_source, chat_template, name
    compat      whose semantics apply; see peta_fast.recipe.load_recipe. Native with keywords
    trained_only   leave out what is frozen in every model; for models that save_trained has written
    device      "cpu", "cuda" or "cuda:N": where tensors are merged, with the same bits

    Raises RecipeError, CheckpointError, CompatibilityError or ResourceError; nothing appears in `out` then.
    """
    if out is None:
        raise RecipeError("out", "expected a folder for the merged checkpoint, got none")
    if method is not None and recipe is None:
        recipe = spelled_out(method, base, models or (), parameters)
    elif recipe is None or parameters or not method is base is models is None:
        given = {"recipe": recipe, "method": method, "base": base, "models": models, **parameters}
        got = ", ".join(key for key, value in given.items() if value is not None) or "nothing"
        raise RecipeError("merge", f"expected a recipe, or method, base, models and parameters; got {got}")
    plan = make_plan(
        load_recipe(recipe, compat=compat),
        max_memory=parse_bytes(max_memory, "max_memory"),
        max_shard_size=parse_bytes(max_shard_size, "max_shard_size"),
        threads=threads,
        trained_only=trained_only,
    )
    return run(
        plan,
        out,
        resume=resume,
        force=force,
        allow_nonfinite=allow_nonfinite,
        threads=threads,
        device=device,
        progress=progress,
    )


def merge_state_dicts(
    base: Mapping[str, Any] | None,
    models: Sequence[Mapping[str, Any]],
    *,
    method: str,
    compat: str = "native",
    seed: int = 0,
    dtype: Any = None,
    trim_scope: str | None = None,
    out: Mapping[str, Any] | None = None,
    threads: int = 0,
    allow_nonfinite: bool = False,
    notes: dict[str, dict] | None = None,
    **parameters: Any,
) -> dict[str, Any]:
    """Merges state dicts in memory.

    base        name -> tensor, torch or numpy; None for methods that take no base
    models      T such dicts with the same names and shapes; tensors may be strided. What a TrainedTensors dict lacks
                is the base's
    dtype       of the result, a name or a torch dtype; the base's, tensor by tensor, when not given
    out         name -> contiguous tensor that takes the result in place, such as a live model's state_dict()
    parameters  the method's keys: one number, or for keys that each model sets, one a model.
                mask: a dict name -> mask, or "<task>/<name>" -> mask, or a file of them
                statistics: one a model, what collect_statistics returned or a file of it
                init (mats): a state dict to begin from, besides the names and files it takes in a recipe
    notes       takes what methods that solve say of each tensor: name -> residuals, ridge and the like

    A tensor with two names stays one where it is one in all dicts. Tensors on a GPU, all on one, are merged there on
    torch's current stream and never leave it; `out` may be a live model's there.

    Returns name -> tensor, of the kind that base (or the first model) holds; those of `out` where it is given.
    Raises RecipeError for parameters, CompatibilityError for names and shapes, CheckpointError for NaN and inf.
    """
    masks = parameters.get("mask")
    if isinstance(masks, Mapping):
        parameters["mask"] = "(in memory)"
    beside = Beside(_named_beside(parameters))
    names = [f"model {t}" for t in range(len(models))]
    settings = {"seed": seed, "dtype": str(dtype).removeprefix("torch.") if dtype is not None else None}
    spelled = spelled_out(
        method, None if base is None else "base", names, {**settings, "trim_scope": trim_scope, **parameters}
    )
    recipe = load_recipe(spelled, compat=compat)
    states = ({"base": base} if base is not None else {}) | dict(zip(names, models, strict=True))
    sources = {ModelRef(label): MemorySource(label, state) for label, state in states.items()}
    mask_source = _mask_source(masks)
    tensors = plan_tensors(recipe, sources, mask_source, beside)
    engine = Engine(
        recipe, tensors, sources, mask_source, threads=threads, allow_nonfinite=allow_nonfinite, beside=beside
    )
    like = next(iter(sources.values()))
    places = _places(tensors, like, out)
    device = _one_device([*sources.values(), *([mask_source] if isinstance(mask_source, MemorySource) else [])], places)
    if device and mask_source is not None and not isinstance(mask_source, MemorySource):
        raise CompatibilityError("mask", f"is a file, the models are on {device}", "Load it and move it there.")
    engine.find_model_statistics()
    for batch in runs_of(tensors, DEVICE_BATCH if device else BATCH):
        engine.fill([Piece(t, 0, t.nbytes, _as_bytes(places[t.name].buffer)) for t in batch])
        engine.forget()
    engine.finish()
    if notes is not None:
        notes.update(engine.notes)
    for alias, name in kept_ties(recipe, sources).items():
        _copy(places[name].buffer, places[alias].buffer, threads)
    return {name: places[name].value for name in like.state if name in places}


RECIPE_KEYS = ("seed", "dtype", "out_dtype", "trim_scope", "tokenizer_source", "chat_template", "name")


def spelled_out(method: str, base, models: Sequence[Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe that says what keywords say, so that one set of checks serves all."""
    if isinstance(models, str | Path):
        raise RecipeError("models", f"expected a list of models, got {str(models)!r}")
    listed: list[dict[str, Any]] = [{"model": str(model), "parameters": {}} for model in models]
    shared: dict[str, Any] = {}
    recipe: dict[str, Any] = {"method": method, "models": listed, "parameters": shared}
    for key, value in given.items():
        value = value.tolist() if hasattr(value, "tolist") else value
        if key in RECIPE_KEYS:
            recipe[key] = value
        elif isinstance(value, Sequence) and not isinstance(value, str):
            if len(value) != len(models):
                raise RecipeError(key, f"expected one value or {len(models)}, one a model, got {len(value)}")
            for entry, one in zip(listed, value, strict=True):
                entry["parameters"][key] = one.item() if hasattr(one, "item") else one
        else:
            shared[key] = str(value) if isinstance(value, Path) else value
    return recipe if base is None else {**recipe, "base_model": str(base)}


def _named_beside(parameters: dict[str, Any]) -> dict[str, MemorySource]:
    """Takes dicts out of the parameters and puts names in their places; what the names stand for."""
    found = {}
    given = parameters.get("statistics")
    if isinstance(given, Sequence) and not isinstance(given, str):
        files = [str(g) if isinstance(g, str | Path) else f"statistics {t}" for t, g in enumerate(given)]
        found = {f: MemorySource(f, g) for f, g in zip(files, given, strict=True) if not isinstance(g, str | Path)}
        parameters["statistics"] = files
    if isinstance(parameters.get("init"), Mapping):
        found["init"] = MemorySource("init", parameters["init"])
        parameters["init"] = "init"
    return found


def _mask_source(masks: Any):
    """Masks out of a dict or, when a path is given, a file."""
    if masks is None:
        return None
    return MemorySource("mask", masks) if isinstance(masks, Mapping) else open_checkpoint(masks)


@dataclass(frozen=True)
class MemoryTensor:
    dtype: str
    shape: tuple[int, ...]
    value: Any

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


class MemorySource:
    """A state dict as the engine sees a checkpoint: a tensor that has two names is tied."""

    def __init__(self, label: str, state: Mapping[str, Any]):
        self.label, self.state = label, state
        kept: Mapping[str, str] = getattr(state, "metadata", {})
        self.metadata = METADATA if isinstance(state, TrainedTensors) else kept
        self.tensors: dict[str, MemoryTensor] = {}
        self.aliases: dict[str, str] = {}
        first: dict[Any, str] = {}
        for name, value in state.items():
            if _is_tensor(value):
                described = _described(label, name, value)
                stored = first.setdefault(_memory_of(value), name) if described.nbytes else name
                if stored == name:
                    self.tensors[name] = described
                else:
                    self.aliases[name] = stored

    def buffer(self, name: str, start: int = 0, stop: int | None = None) -> Buffer:
        tensor = self.tensors[name]
        whole = _buffer(tensor.value, tensor.dtype)
        return whole.slice(start, whole.size if stop is None else stop)


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _memory_of(value: Any) -> tuple:
    """Equal for tensors that are the same memory, read in the same way."""
    if isinstance(value, np.ndarray):
        return value.__array_interface__["data"][0], value.shape, value.strides, str(value.dtype)
    return value.data_ptr(), tuple(value.shape), value.stride(), str(value.dtype)


def _described(label: str, name: str, value: Any) -> MemoryTensor:
    long = str(value.dtype).removeprefix("torch.")
    if long not in SHORT_NAMES:
        raise CompatibilityError(label, f"{name!r} is {long}, expected one of {', '.join(SHORT_NAMES)}")
    if not isinstance(value, np.ndarray) and value.device.type not in ("cpu", "cuda"):
        raise CompatibilityError(
            label, f"{name!r} is on {value.device}, expected the CPU or a CUDA device", "Move it with .cpu()."
        )
    return MemoryTensor(SHORT_NAMES[long], tuple(value.shape), value)


def device_of(value: Any) -> str:
    """Whose memory a tensor lies in: "" for the host's, or "cuda:0"."""
    if isinstance(value, np.ndarray) or value.device.type == "cpu":
        return ""
    return str(value.device)


def _one_device(sources: Sequence[MemorySource], places: Mapping[str, Place]) -> str:
    """The device of all tensors. Raises CompatibilityError when they are not on one."""
    first: dict[str, str] = {}
    for source in sources:
        for name, tensor in source.tensors.items():
            first.setdefault(device_of(tensor.value), f"{source.label}: {name!r}")
    for name, place in places.items():
        first.setdefault(place.buffer.device, f"out: {name!r}")
    if len(first) > 1:
        where = ", ".join(f"{who} on {device or 'the CPU'}" for device, who in first.items())
        raise CompatibilityError("tensors", f"expected all on one device, got {where}", "Move them with .to(device).")
    return next(iter(first), "")


def _buffer(value: Any, dtype: str) -> Buffer:
    """The elements in row-major order, without a copy where they lie so."""
    if isinstance(value, np.ndarray):
        return Buffer.from_array(np.ascontiguousarray(value).reshape(-1), dtype)
    value = value.detach().contiguous()
    return Buffer(value.data_ptr(), dtype, value.numel(), value, device_of(value))


@dataclass(frozen=True)
class Place:
    """Where one merged tensor goes."""

    value: Any
    buffer: Buffer


def _places(tensors: list[TensorPlan], like: MemorySource, out: Mapping[str, Any] | None) -> dict[str, Place]:
    """Where everything goes: new tensors, of which tied names share one, or those of `out`."""
    if out is not None:
        return places_in(tensors, out)
    places = {}
    for tensor in tensors:
        if tensor.action == "alias":
            places[tensor.name] = places[like.aliases[tensor.name]]
        else:
            value = _empty(tensor, like.state[tensor.name])
            places[tensor.name] = Place(value, _buffer(value, tensor.dtype))
    return places


def places_in(tensors: Sequence[TensorPlan], out: Mapping[str, Any]) -> dict[str, Place]:
    """The tensors of `out` that take a merge in place. Raises CompatibilityError for those that do not fit."""
    places = {t.name: _place_in(out, t) for t in tensors}
    _refuse_shared(tensors, places)
    return places


def _place_in(out: Mapping[str, Any], tensor: TensorPlan) -> Place:
    if tensor.name not in out:
        raise CompatibilityError("out", f"lacks {tensor.name!r}")
    value = out[tensor.name]
    found = _described("out", tensor.name, value)
    if (found.dtype, found.shape) != (tensor.dtype, tensor.shape):
        raise CompatibilityError(
            "out", f"{tensor.name!r} is {found.dtype} {list(found.shape)}, expected {tensor.dtype} {list(tensor.shape)}"
        )
    if not (value.flags.c_contiguous if isinstance(value, np.ndarray) else value.is_contiguous()):
        raise CompatibilityError("out", f"{tensor.name!r} is strided, expected a contiguous tensor")
    return Place(value, _buffer(value, tensor.dtype))


def _refuse_shared(tensors: list[TensorPlan], places: Mapping[str, Place]) -> None:
    """What is merged apart needs places apart."""
    first: dict[int, str] = {}
    for tensor in tensors:
        if tensor.action != "alias" and tensor.size:
            other = first.setdefault(places[tensor.name].buffer.address, tensor.name)
            if other != tensor.name:
                raise CompatibilityError("out", f"{tensor.name!r} and {other!r} share memory, but are merged apart")


def _empty(tensor: TensorPlan, like: Any) -> Any:
    if isinstance(like, np.ndarray):
        return np.empty(tensor.shape, LONG_NAMES[tensor.dtype])
    import torch

    try:
        return torch.empty(tensor.shape, dtype=getattr(torch, LONG_NAMES[tensor.dtype]), device=like.device)
    except torch.OutOfMemoryError as error:
        from peta_fast.ops.device import out_of_memory

        raise out_of_memory(str(like.device), tensor.nbytes, error) from error


def _as_bytes(buffer: Buffer) -> Buffer:
    return Buffer(buffer.address, "U8", buffer.nbytes, buffer.owner, buffer.device)


def _copy(source: Buffer, target: Buffer, threads: int) -> None:
    if source.address != target.address:
        backend(target.device).copy_bytes(target.address, source.address, source.nbytes, threads)
