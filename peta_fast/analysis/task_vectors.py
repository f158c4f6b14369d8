"""Task vectors of checkpoints, measured in one streaming pass: norms, angles, sign conflicts, by tensor and by layer.

    cosine[s, t] = <tau_s, tau_t> / max(|tau_s| |tau_t|, 1e-8)

Cost: base and T models come from memory once, 2 (T + 1) bytes a parameter in bf16; sums in fp64 over a fixed tree.
Source: Tang et al., ICLR 2024, arXiv:2310.04742, figure 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from peta_fast._assignment import BEFORE_LAYERS, layer_of
from peta_fast._engine import Engine
from peta_fast._tensor_plan import TensorPlan
from peta_fast.analysis.figures import Figure
from peta_fast.errors import CheckpointError, RecipeError
from peta_fast.merging import MemorySource
from peta_fast.ops.delta_merge import Inputs
from peta_fast.ops.records import BASE_ZERO
from peta_fast.ops.task_statistics import task_statistics
from peta_fast.plan import make_plan, plan_tensors
from peta_fast.recipe import ModelRef, Recipe, load_recipe

TILE = 1 << 23
"""Elements looked at in one step: those of the base are still in a cache when its own norm is taken. Smaller steps cost
more in waking threads than they save."""
EPSILON = 1e-8
"""Least product of norms that a cosine is divided by."""


@dataclass(frozen=True)
class Sums:
    """What adds up over the elements of a tensor, a layer, a model.

    gram       [T, T] fp64 inner products of the task vectors
    l1         [T] fp64
    largest    [T] fp32, max |tau|
    nonzero    [T] elements
    conflicts  [T, T] elements where two task vectors have opposite signs
    any_conflict  elements where any two have
    base_square   the squared norm of the base
    """

    size: int
    gram: np.ndarray
    l1: np.ndarray
    largest: np.ndarray
    nonzero: np.ndarray
    conflicts: np.ndarray
    any_conflict: int
    base_square: float

    @classmethod
    def zero(cls, tasks: int) -> Sums:
        square, line = (tasks, tasks), (tasks,)
        return cls(0, np.zeros(square), np.zeros(line), np.zeros(line, np.float32), np.zeros(line, np.int64),
                   np.zeros(square, np.int64), 0, 0.0)  # fmt: skip

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            self.size + other.size,
            self.gram + other.gram,
            self.l1 + other.l1,
            np.maximum(self.largest, other.largest),
            self.nonzero + other.nonzero,
            self.conflicts + other.conflicts,
            self.any_conflict + other.any_conflict,
            self.base_square + other.base_square,
        )

    @property
    def norms(self) -> np.ndarray:
        """[T] fp64 Euclidean norms of the task vectors."""
        return np.sqrt(np.diagonal(self.gram))

    @property
    def relative(self) -> np.ndarray:
        """[T] norms of the task vectors, that of the base being 1; NaN where the base is zero."""
        return self.norms / np.sqrt(self.base_square) if self.base_square else np.full(len(self.l1), np.nan)

    @property
    def cosine(self) -> np.ndarray:
        """[T, T]; zero rows for vectors of no length."""
        return self.gram / np.maximum(np.outer(self.norms, self.norms), EPSILON)

    @property
    def conflict_share(self) -> float:
        """Of the elements, those where any two task vectors have opposite signs."""
        return self.any_conflict / self.size if self.size else 0.0


@dataclass(frozen=True)
class TaskVectors:
    """What `measure` found.

    names    of the T models
    tensors  name -> Sums, in the base's order: all floating tensors that any model has trained
    left_out tensor -> why it was not measured
    """

    names: tuple[str, ...]
    tensors: Mapping[str, Sums]
    left_out: Mapping[str, str]

    @cached_property
    def total(self) -> Sums:
        """Over the whole model."""
        return sum(self.tensors.values(), Sums.zero(len(self.names)))

    @cached_property
    def layers(self) -> dict[str, Sums]:
        """Layer -> Sums, from the input to the output. Tensors outside of layers stand by their module's name."""
        found: dict[str, Sums] = {}
        for name, sums in sorted(self.tensors.items(), key=lambda item: depth(item[0])):
            label = layer_label(name)
            found[label] = found[label] + sums if label in found else sums
        return found

    def figures(self) -> list[Figure]:
        from peta_fast.analysis.task_vector_figures import figures_of

        return figures_of(self)


def layer_label(name: str) -> str:
    """ "model.layers.3.mlp.up_proj.weight" -> "layers.3"; "model.norm.weight" -> "norm"."""
    found = layer_of(name)
    if found:
        return f"{found[0].rpartition('.')[2]}.{found[1]}"
    module, _, parameter = name.rpartition(".")
    return module.rpartition(".")[2] or parameter


def depth(name: str) -> tuple:
    """Sorts tensors as data passes them, as far as names tell."""
    found = layer_of(name)
    if found:
        return (1, found[0], found[1])
    return (0,) if any(part in name.lower() for part in BEFORE_LAYERS) else (2,)


def measure(
    base: str | Path,
    models: Sequence[str | Path],
    *,
    names: Sequence[str] | None = None,
    threads: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> TaskVectors:
    """The task vectors of checkpoints on disk: folders, weight files or hub ids.

    names     of the models; by default their folders' names
    progress  called with bytes read and bytes to read

    Raises CompatibilityError with all tensors that do not fit, CheckpointError for files that cannot be read and,
    naming tensor and file, for NaN and infinities.
    """
    names = labels_of(models, names)
    recipe = _sum_of(str(base), [str(m) for m in models])
    plan = make_plan(recipe)
    try:
        return _measured(names, recipe, plan.tensors, plan.sources, threads, progress)
    finally:
        for source in plan.sources.values():
            source.close()


def measure_state_dicts(
    base: Mapping[str, Any],
    models: Sequence[Mapping[str, Any]],
    *,
    names: Sequence[str] | None = None,
    threads: int = 0,
) -> TaskVectors:
    """The same of state dicts: torch tensors or numpy arrays on the CPU."""
    places = [f"model {t}" for t in range(len(models))]
    names = labels_of(places, names)
    recipe = _sum_of("base", places)
    states = {"base": base, **dict(zip(places, models, strict=True))}
    sources = {ModelRef(label): MemorySource(label, state) for label, state in states.items()}
    return _measured(names, recipe, plan_tensors(recipe, sources, None), sources, threads, lambda done, total: None)


def labels_of(models: Sequence[str | Path], names: Sequence[str] | None) -> tuple[str, ...]:
    """One name a model, all different. Raises RecipeError."""
    if isinstance(models, str | Path) or not len(models):
        raise RecipeError("models", f"expected a list of one model or more, got {models!r}")
    found = tuple(map(str, names)) if names is not None else _short_names(models)
    if len(found) != len(models) or len(set(found)) != len(found):
        raise RecipeError("names", f"expected {len(models)} different names, one a model, got {list(found)}")
    return found


def _short_names(models: Sequence[str | Path]) -> tuple[str, ...]:
    """The last parts of the paths; whole paths where those are not different."""
    last = tuple(Path(str(m)).name or str(m) for m in models)
    return last if len(set(last)) == len(last) else tuple(map(str, models))


def _sum_of(base: str, models: Iterable[str]) -> Recipe:
    """The recipe whose plan says which tensors have task vectors; what does not fit is refused as in a merge."""
    listed = [{"model": model} for model in models]
    return load_recipe(
        {"method": "task_arithmetic", "base_model": base, "models": listed, "parameters": {"weight": 1.0}}
    )


def _measured(names, recipe: Recipe, tensors: Sequence[TensorPlan], sources, threads: int, progress) -> TaskVectors:
    engine = Engine(recipe, tensors, sources, None, threads=threads)
    measured = [t for t in tensors if t.action == "merge"]
    left_out = {t.name: t.reason or t.action for t in tensors if t.action != "merge"}
    total, done, found = sum(t.input_bytes for t in measured), 0, {}
    for tensor in measured:
        found[tensor.name] = _sums(engine.inputs(tensor), threads)
        done += tensor.input_bytes
        for ref, name in tensor.inputs:
            getattr(sources[ref], "release", lambda name: None)(name)
        progress(done, total)
    if not measured:
        raise RecipeError(str(recipe.base), "no floating tensor differs from the base in any model")
    return TaskVectors(names, found, left_out)


def _sums(inputs: Inputs, threads: int) -> Sums:
    """Of one tensor, tile by tile."""
    found = Sums.zero(len(inputs.models))
    for start in range(0, inputs.size, TILE):
        stop = min(start + TILE, inputs.size)
        base = inputs.base.slice(start, stop)
        tasks = task_statistics(base, [m.slice(start, stop) for m in inputs.models], threads=threads)
        own = task_statistics(None, [base], base_kind=BASE_ZERO, threads=threads)
        if tasks.nonfinite.any() or own.nonfinite.any():
            _refuse_nonfinite(inputs, threads)
        found += Sums(tasks.size, tasks.gram, tasks.l1, tasks.largest, tasks.nonzero, tasks.conflicts,
                      tasks.any_conflict, float(own.gram[0, 0]))  # fmt: skip
    return found


def _refuse_nonfinite(inputs: Inputs, threads: int) -> None:
    for label, buffer in zip(inputs.labels, [inputs.base, *inputs.models], strict=True):
        count = int(task_statistics(None, [buffer], base_kind=BASE_ZERO, threads=threads).nonfinite[0])
        if count:
            problem = f"{inputs.name!r}: expected finite values, got {count} NaN or inf"
            raise CheckpointError(label, problem, "Mend that checkpoint.")
    raise CheckpointError(inputs.name, "differences between models are not finite in fp32")
