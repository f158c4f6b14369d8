"""KnOTS over whole adapters: every module is aligned, the representations are merged together, and put back.

    D_t = w_t s_t B_t A_t = U rep_t;   merged = U inner(rep_1 .. rep_T), the inner method over all modules at once

Memory: the representations, T (sum r_t) n fp32 numbers a module.
Source: Stoica et al., ICLR 2025, arXiv:2410.19735.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from peta_fast.errors import RecipeError
from peta_fast.merging import merge_state_dicts
from peta_fast.ops.low_rank import Aligned, LowRank, aligned, distance, norm_of, truncated

if TYPE_CHECKING:
    from peta_fast.adapters.merge import Merger


def merge_in_common_basis(merger: Merger) -> Iterator[tuple[str, LowRank, float, float]]:
    """(module, change, norm, error) for every module of the merger's adapters."""
    group, recipe = merger.group, merger.settings.recipe
    bases: dict[str, Aligned] = {}
    settings: dict[str, Any] = {}
    for name in group.modules:
        with merger.clock("reading"):
            changes = group.changes(name)
        with merger.clock("merging"):
            values = merger.resolver.values(f"{name}.weight")
            weights = values.pop("weight")
            settings.setdefault(str(values), values)
            terms: list[LowRank | None] = [None] * len(group.adapters)
            for change in changes:
                terms[change.place] = change.scaled(weights[change.place])
            bases[name] = aligned(terms)
    if len(settings) > 1:
        raise RecipeError(
            "knots", f"merges all modules at once, so one setting must hold for all; got {' and '.join(settings)}",
            "Weights alone may differ from layer to layer.",
        )  # fmt: skip
    with merger.clock("merging"):
        reps = [{name: b.reps[t].float() for name, b in bases.items()} for t in range(len(group.adapters))]
        zeros = {name: torch.zeros_like(rep) for name, rep in reps[0].items()}
        keys = {key: list(v) if isinstance(v, tuple) else v for key, v in next(iter(settings.values())).items()}
        merged = merge_state_dicts(
            zeros,
            reps,
            method=recipe.method,
            compat=recipe.compat,
            seed=recipe.seed,
            threads=merger.threads,
            weight=1.0,
            trim_scope=recipe.trim_scope,
            **keys,
        )
    for name, basis in bases.items():
        with merger.clock("merging"):
            exact = basis.change(merged[name])
            if merger.settings.rank:
                found = truncated(exact, merger.settings.rank, merger.dtype)
                result = found.change, found.norm, found.error
            else:
                stored = exact.to(merger.dtype)
                result = stored, norm_of(exact), distance(stored, exact)
        yield name, *result
