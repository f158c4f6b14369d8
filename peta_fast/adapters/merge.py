"""Adapters in, one adapter out.

    cat                sum_t w_t s_t B_t A_t, exact, of rank sum r_t
    svd                its best approximation of a rank, through QR of the stacked factors
    linear             PEFT's sum of the factors, with the cross terms that it brings
    element-wise       ties, dare_*, della*, breadcrumbs*, magnitude_prune, task_arithmetic: over the entries of B A,
                       formed tile by tile and factored again; or over those of A and of B, as PEFT does
    knots              element-wise in the common basis of all changes
    space "phi"        element-wise over the steps of linearized adapters from their one point: see linearized.py

Source: PEFT 0.21.2 (add_weighted_adapter), arXiv:2410.19735 (KnOTS), arXiv:2310.04742 (L-LoRA).
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from peta_fast.adapters.elementwise import merged_changes, merged_tensor, with_weights
from peta_fast.adapters.inputs import AdapterSet, Change, open_adapters
from peta_fast.adapters.replaced import REPLACED, carried
from peta_fast.adapters.results import AdapterReport, ModuleReport, Stored, adapter_card, refuse_output, write_lora
from peta_fast.adapters.settings import Resolver, Settings, read_settings
from peta_fast.errors import CompatibilityError, RecipeError
from peta_fast.formats.lora_adapter import LoraAdapter
from peta_fast.ops.low_rank import (
    LowRank,
    distance,
    linear_peft,
    norm_of,
    refactored,
    shares,
    stacked,
    truncated,
)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SUM = "the weighted sum of the adapters' changes"
CROSS_TERMS = (
    "linear adds the factors, not their products: beside sum w s B A the result holds cross terms B_i A_j of different "
    "adapters; the error says how large they are"
)


def merge_adapters(
    adapters: Sequence[str | Path] | str | Path | Mapping[str, Any],
    out: str | Path,
    *,
    method: str | None = None,
    rank: int | None = None,
    weights: Sequence[Any] | None = None,
    space: str | None = None,
    inner: str | None = None,
    base: str | None = None,
    compat: str | None = None,
    seed: int = 0,
    dtype: str = "float32",
    replaced: str = "refuse",
    threads: int = 0,
    force: bool = False,
    **parameters: Any,
) -> AdapterReport:
    """Merges LoRA adapters into one, as `peta-fast adapter merge` does. No dense model is read or formed.

        merge_adapters(["a", "b", "c"], "merged", method="svd", rank=16, weights=[0.4, 0.3, 0.3])

    adapters    folders or hub ids; or a recipe, a path or mapping with method, rank and models
    method      svd when not given
    rank        of the result: for svd and element-wise methods the largest of the inputs' unless given
    weights     one an adapter: a number, a list (a gradient over the layers), or a list of {filter, value}; 1 each
    space       "delta" (default), "factors" or "phi", for element-wise methods
    inner       for knots: the element-wise method that is run in the common basis; ties
    base        the base's name in the result, where the adapters call it differently
    dtype       of the result's factors
    replaced    what becomes of tensors that several adapters replace as a whole: "refuse", "mean" or "first"
    parameters  the method's keys: density, lambda, ...

    Returns what was written, with the energy kept and the error against the exact change of every module.
    Raises RecipeError, CheckpointError, CompatibilityError or ResourceError; nothing is written then.
    """
    settings = read_settings(
        adapters, method=method, rank=rank, space=space, inner=inner, weights=weights, compat=compat, seed=seed,
        parameters=parameters,
    )  # fmt: skip
    for what, name, known in (("dtype", dtype, DTYPES), ("replaced", replaced, REPLACED)):
        if name not in known:
            raise RecipeError(what, f"expected one of {', '.join(known)}, got {name!r}")
    out = Path(out)
    if settings.space == "phi":
        from peta_fast.adapters.linearized import merge_linearized

        return merge_linearized(settings, out, base=base, threads=threads, force=force)
    clock = Clock()
    with clock("reading"):
        opened = open_adapters(settings.adapters)
        group = AdapterSet(opened, base)
    refuse_output(out, [adapter.path for adapter in opened], force)
    with clock("reading"):
        kept = carried(opened, replaced)
    merger = Merger(settings, group, DTYPES[dtype], threads, clock)
    modules, reports = merger.run()
    with clock("writing"):
        card = adapter_card(group.base, list(settings.adapters), settings.method, settings.recipe.text)
        write_lora(out, modules, kept, merged_config(group, kept), card)
    notes = [CROSS_TERMS] if settings.method == "linear" and len(opened) > 1 else []
    return AdapterReport(out, settings.method, merger.exact, reports, sorted(kept), dict(clock.seconds), notes)


class Clock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - began


class Merger:
    """Makes the result module by module; knots looks at all of them at once."""

    def __init__(self, settings: Settings, group: AdapterSet, dtype: torch.dtype, threads: int, clock: Clock):
        self.settings, self.group, self.dtype, self.threads, self.clock = settings, group, dtype, threads, clock
        self.resolver: Resolver = settings.resolver(group.tensors)
        self.exact = SUM if settings.is_sum or settings.method == "linear" or settings.space == "factors" else (
            f"{settings.method} over the entries of the adapters' changes"
        )  # fmt: skip

    def run(self) -> tuple[dict[str, Stored], list[ModuleReport]]:
        make = self._knots() if self.settings.method == "knots" else self._one_by_one()
        modules, reports = {}, []
        for name, change, norm, error in make:
            module = next(iter(self.group.modules[name].values()))
            _, *tail = module.stored[0][1:]
            modules[name] = Stored(change, module.embedding, tuple(tail), module.stored[0][1])
            reports.append(ModuleReport(name, change.rank, norm, error))
        return modules, reports

    def _one_by_one(self) -> Iterator[tuple[str, LowRank, float, float]]:
        for name in self.group.modules:
            with self.clock("reading"):
                changes = self.group.changes(name)
            with self.clock("merging"):
                yield name, *self._merged(name, changes)

    def _merged(self, name: str, changes: list[Change]) -> tuple[LowRank, float, float]:
        values = self.resolver.values(f"{name}.weight")
        weights = sum_weights(values) if self.settings.inner == "task_arithmetic" else values["weight"]
        if self.settings.is_sum:
            return self._sum(changes, weights)
        if self.settings.method == "linear" or self.settings.space == "factors":
            return self._on_factors(name, changes, values, weights)
        terms = {c.place: c.scaled() for c in changes}
        tiles = merged_changes(self.settings.recipe, values, name, terms, self.threads)
        found = refactored(tiles, self._rank(changes), seed=self.settings.recipe.seed, dtype=self.dtype)
        return found.change, found.norm, found.error

    def _rank(self, changes: Sequence[Change]) -> int:
        return self.settings.rank or max(c.module.rank for c in changes)

    def _sum(self, changes: list[Change], weights: Sequence[float]) -> tuple[LowRank, float, float]:
        total = stacked([c.factors for c in changes], [weights[c.place] * c.module.scaling for c in changes])
        rank = self._rank(changes)
        if self.settings.method == "cat":
            stored = total.to(self.dtype)
            exact = stacked([c.factors.to(torch.float64) for c in changes],
                            [weights[c.place] * c.module.scaling for c in changes])  # fmt: skip
            return stored, norm_of(exact), distance(stored, exact)
        found = truncated(total, rank, self.dtype)
        return found.change, found.norm, found.error

    def _on_factors(self, name: str, changes, values, weights) -> tuple[LowRank, float, float]:
        """A and B each for itself, weighted by the root of what their product is to be weighted by."""
        if len({c.module.rank for c in changes}) != 1:
            ranks = ", ".join(f"{self.group.adapters[c.place]}: {c.module.rank}" for c in changes)
            raise CompatibilityError(
                name, f"{self.settings.method} over factors needs adapters of one rank, got {ranks}",
                "Use svd, cat, or the method over the changes themselves (--space delta).",
            )  # fmt: skip
        scaled = [weights[c.place] * c.module.scaling for c in changes]
        if self.settings.method == "linear":
            found = linear_peft([(c.factors.B, c.factors.A) for c in changes], scaled)
        else:
            found = self._merge_factors(name, changes, values, scaled)
        exact = stacked([c.factors.to(torch.float64) for c in changes], scaled)
        stored = found.to(self.dtype)
        return stored, norm_of(exact), distance(stored, exact)

    def _merge_factors(self, name: str, changes, values, scaled) -> LowRank:
        sides = {}
        for side, roots in zip("AB", shares(scaled), strict=True):
            own = with_weights(values, dict(zip([c.place for c in changes], roots, strict=True)))
            terms = {c.place: getattr(c.factors, side) for c in changes}
            sides[side] = merged_tensor(self.settings.recipe, own, f"{name}.lora_{side}", terms, self.threads)
        return LowRank(sides["B"], sides["A"])

    def _knots(self) -> Iterator[tuple[str, LowRank, float, float]]:
        """All modules are aligned first: the inner method's thresholds may be those of the whole adapter."""
        from peta_fast.adapters.common_basis import merge_in_common_basis

        return merge_in_common_basis(self)


def sum_weights(values: Mapping[str, Any]) -> tuple[float, ...]:
    """What the changes are multiplied by in a sum: weights, lambda, and the divisor of `normalize`."""
    total = sum(values["weight"])
    divisor = total if values.get("normalize") and abs(total) >= 1e-8 else 1.0
    return tuple(w * values.get("scaling", 1.0) / divisor for w in values["weight"])


def merged_config(group: AdapterSet, kept: Mapping[str, Any]) -> dict[str, Any]:
    """adapter_config.json of the result, ranks and alphas left out: they come with the factors."""
    configs = [adapter.config for adapter in group.adapters]
    tasks = {config.get("task_type") for config in configs}
    biases = [config.get("bias") or "none" for config in configs]
    saved = sorted({name for config in configs for name in config.get("modules_to_save") or []})
    return {
        "peft_type": "LORA",
        "task_type": tasks.pop() if len(tasks) == 1 else None,
        "base_model_name_or_path": group.base,
        "bias": next((bias for bias in biases if bias != "none"), "none"),
        "fan_in_fan_out": group.adapters[0].fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "modules_to_save": [name for name in saved if any(f".{name}." in f".{key}." for key in kept)] or None,
        "target_modules": merged_targets(group.adapters, list(group.modules)),
    }


def merged_targets(adapters: Sequence[LoraAdapter], modules: Sequence[str]) -> list[str]:
    """What makes PEFT choose these modules: the adapters' own lists where they are names alone, else all names."""
    lists = [adapter.config.get("target_modules") for adapter in adapters]
    narrowed = any(
        adapter.config.get(key) for adapter in adapters for key in ("layers_to_transform", "exclude_modules")
    )
    if narrowed or not all(isinstance(names, list) for names in lists):
        return sorted(modules)
    named = {name for names in lists for name in names}
    covered = {name for name in modules if any(name == tail or name.endswith(f".{tail}") for tail in named)}
    return sorted(named if covered == set(modules) else modules)
