"""Linearized adapters merged in their tangent space: the steps from one common point, entry by entry.

    step = merge_t (delta_A_t, delta_B_t)        task_arithmetic: the sum of task vectors, equal to that of the changes

What comes out is a linearized adapter at the same point, and beside it what plain PEFT loads.
Source: Tang et al., ICLR 2024, arXiv:2310.04742.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from peta_fast.adapters.elementwise import merged_tensor
from peta_fast.adapters.inputs import AdapterSet, open_adapters
from peta_fast.adapters.replaced import carried
from peta_fast.adapters.results import CARD, AdapterReport, ModuleReport, adapter_card, refuse_output
from peta_fast.adapters.settings import Settings
from peta_fast.errors import CompatibilityError
from peta_fast.formats.peft_adapter import (
    PREFIX,
    SIDECAR,
    Linearization,
    LinearizedFactors,
    plain_factors,
    plain_ranks,
    rank_fields,
    read_linearization,
    refuse_nonfinite,
    write_adapter,
)
from peta_fast.nn.combine import check_same_point
from peta_fast.ops.low_rank import LowRank, distance, norm_of, stacked


def merge_linearized(settings: Settings, out: Path, *, base: str | None, threads: int, force: bool) -> AdapterReport:
    """Raises CheckpointError where there is no linearization, CompatibilityError where points or scopes differ."""
    from peta_fast.adapters.merge import SUM, Clock, merged_config, sum_weights

    clock = Clock()
    with clock("reading"):
        opened = open_adapters(settings.adapters)
        group = AdapterSet(opened, base)
        refuse_output(out, [adapter.path for adapter in opened], force)
        read = [read_linearization(adapter.path) for adapter in opened]
        for adapter, one in zip(opened, read, strict=True):
            refuse_nonfinite(one, str(adapter.path / SIDECAR))
        scope = _one_scope(settings, read)
        kept = carried(opened)
    resolver = settings.resolver([f"{name}.weight" for one in read for name in one.modules])
    names = list(dict.fromkeys(name for one in read for name in one.modules))
    modules, reports, is_sum = {}, [], settings.method == "task_arithmetic"
    for name in names:
        terms = {place: one.modules[name] for place, one in enumerate(read) if name in one.modules}
        with clock("merging"):
            modules[name] = merged = _merged(settings, resolver.values(f"{name}.weight"), name, terms, threads)
            weights = sum_weights(resolver.values(f"{name}.weight"))
            exact = stacked([plain(f) for f in terms.values()], [weights[p] for p in terms])
            stored = plain(merged)
            reports.append(ModuleReport(name, stored.rank, norm_of(exact), distance(stored, exact)))
    with clock("writing"):
        config = merged_config(group, kept) | rank_fields(plain_ranks(modules))
        card = adapter_card(
            group.base, list(settings.adapters), f"{settings.method} in phi space", settings.recipe.text
        )
        replaced = {key.removeprefix(PREFIX): tensor for key, tensor in kept.items()}
        write_adapter(out, Linearization(modules, scope), config, replaced, {CARD: card.encode()})
    notes = [] if is_sum else [f"{settings.method} over the steps is no sum: the error is its distance from {SUM}"]
    return AdapterReport(out, settings.method, SUM, reports, sorted(kept), dict(clock.seconds), notes)


def _one_scope(settings: Settings, read: list[Linearization]) -> str:
    scopes = {one.scope for one in read}
    if len(scopes) > 1:
        found = ", ".join(f"{name}: {one.scope!r}" for name, one in zip(settings.adapters, read, strict=True))
        raise CompatibilityError("phi", f"expected linearizations of one scope, got {found}")
    return scopes.pop()


def _merged(settings: Settings, values, name: str, terms: Mapping[int, LinearizedFactors], threads: int):
    first, *others = terms
    point = terms[first]
    for other in others:
        check_same_point(name, settings.adapters[first], point, settings.adapters[other], terms[other])

    def step(part: str) -> Tensor | None:
        steps = {place: getattr(factors, part) for place, factors in terms.items()}
        if steps[first] is None:
            return None
        merged = merged_tensor(settings.recipe, values, f"{name}.{part}", steps, threads)
        return merged.to(torch.promote_types(steps[first].dtype, torch.float32))

    return replace(point, delta_A=step("delta_A"), delta_B=step("delta_B"))


def plain(factors: LinearizedFactors) -> LowRank:
    """The change of the weight, in fp64."""
    A, B = plain_factors(factors)
    return LowRank(B.double(), A.double())
