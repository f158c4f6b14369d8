"""Entry by entry over changes of low rank: the methods of the methods folder, run by the fused kernel without a base.

A change is formed tile by tile inside the kernel; what comes out is kept where it is small, else made anew whenever
it is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peta_fast import methods
from peta_fast.buffers import Buffer, FactorsBuffer
from peta_fast.errors import RecipeError
from peta_fast.methods import TensorSpec
from peta_fast.ops.delta_merge import Inputs, Job, Prepared, merge, prepare
from peta_fast.ops.low_rank import DenseTiles, LowRank, Tiles
from peta_fast.recipe import Recipe

KEPT_BYTES = 512 << 20
"""A merged change of at most this size is formed once and kept; larger ones are formed once for every reading."""
TILE = 1 << 22
"""Elements of a run of rows."""


@dataclass(frozen=True)
class MergedTiles:
    """A merged change that is formed anew for every reading, in runs of rows."""

    prepared: Prepared
    shape: tuple[int, int]
    threads: int

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        rows, columns = self.shape
        step = max(1, TILE // columns)
        for row in range(0, rows, step):
            stop = min(row + step, rows)
            yield (
                row,
                torch.from_numpy(_formed(self.prepared, row * columns, stop * columns, self.threads)).view(-1, columns),
            )


def merged_changes(
    recipe: Recipe,
    values: Mapping[str, Any],
    name: str,
    terms: Mapping[int, LowRank],
    threads: int,
    kept: int = KEPT_BYTES,
) -> Tiles:
    """The method over the entries of B A. terms: by the adapter's place, without weights."""
    shape = next(iter(terms.values())).shape
    buffers = {place: _factors(term) for place, term in terms.items()}
    prepared = _prepared(recipe, values, name, shape, buffers, threads)
    tiles = MergedTiles(prepared, shape, threads)
    if 4 * shape[0] * shape[1] > kept:
        return tiles
    return DenseTiles(torch.from_numpy(_formed(prepared, 0, prepared.inputs.size, threads)).view(shape))


def merged_tensor(
    recipe: Recipe, values: Mapping[str, Any], name: str, terms: Mapping[int, Tensor], threads: int
) -> Tensor:
    """The method over the entries of tensors as they are: factors, or steps of linearized adapters. fp32."""
    tensors = {place: term.float().contiguous() for place, term in terms.items()}
    shape = tuple(next(iter(tensors.values())).shape)
    buffers = {place: Buffer(t.data_ptr(), "F32", t.numel(), t) for place, t in tensors.items()}
    prepared = _prepared(recipe, values, name, shape, buffers, threads)
    return torch.from_numpy(_formed(prepared, 0, prepared.inputs.size, threads)).view(shape)


def with_weights(values: Mapping[str, Any], weights: Mapping[int, float]) -> dict[str, Any]:
    """The same keys with the weights of some places replaced."""
    return {**values, "weight": tuple(weights.get(t, w) for t, w in enumerate(values["weight"]))}


def _factors(term: LowRank) -> FactorsBuffer:
    B, A = (np.ascontiguousarray(factor.float().numpy()) for factor in (term.B, term.A))
    return FactorsBuffer.of(B, A)


def _prepared(recipe: Recipe, values, name: str, shape, buffers: Mapping[int, Buffer], threads: int) -> Prepared:
    module = methods.get(recipe.method)
    params = methods.build(module, _of_places(module, values, list(buffers)))
    faults = module.check(params, recipe.compat) if hasattr(module, "check") else []
    if faults:
        raise RecipeError(recipe.name or recipe.method, "; ".join(faults))
    size = shape[0] * shape[1]
    spec = module.lower(params, TensorSpec(name, shape, len(buffers), recipe.compat, "tensor", size))
    if spec.scope != "tensor" or spec.needs_model_signs:
        raise RecipeError(
            recipe.method,
            f"compat {recipe.compat!r} looks at the whole model, which adapters in this space do not have",
            "Use compat: native or peft; or the method knots.",
        )
    inputs = Inputs(name, tuple(shape), None, tuple(buffers.values()))
    return prepare([(replace(spec, base="zero"), inputs)], seed=recipe.seed, threads=threads)[0]


def _of_places(module, values: Mapping[str, Any], places: Sequence[int]) -> dict[str, Any]:
    """The values of those adapters alone that know the module."""
    keys = methods.keys(module)
    return {k: tuple(v[p] for p in places) if keys[k].per_model else v for k, v in values.items()}


def _formed(prepared: Prepared, start: int, stop: int, threads: int) -> np.ndarray:
    out = np.empty(stop - start, np.float32)
    merge([Job(prepared, start, stop, Buffer.from_array(out, "F32"))], threads=threads)
    return out
