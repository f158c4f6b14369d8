"""Small families of models to merge, and what it means that a merge is right."""

from __future__ import annotations

import torch
from references import assert_close_to_reference, merge_with_terms
from torch import Tensor

import peta_fast

SHAPES = {"embed.weight": (24, 40), "experts.weight": (3, 8, 5), "norm.bias": (41,), "scale": (), "spare": (0, 7)}
WITHOUT_BASE = ("linear", "slerp", "passthrough")


def family(num_tasks=3, base_dtype=torch.float32, model_dtypes=(torch.float32,), shapes=SHAPES, seed=0):
    """A base and models fine-tuned from it, their small task vectors partly shared and partly exactly zero."""
    draw = torch.Generator().manual_seed(seed)
    base = {n: torch.randn(s, generator=draw).to(base_dtype) for n, s in shapes.items()}
    common = {n: torch.randn(s, generator=draw) for n, s in shapes.items()}
    models = []
    for task in range(num_tasks):
        moved = {n: (torch.rand(s, generator=draw) < 0.9) / 20 for n, s in shapes.items()}
        own = {n: torch.randn(s, generator=draw) + common[n] / 2 for n, s in shapes.items()}
        dtype = model_dtypes[task % len(model_dtypes)]
        models.append({n: (base[n].float() + moved[n] * own[n]).to(dtype) for n in shapes})
    return base, models


def coarse_family(num_tasks=3, shapes=SHAPES, levels=3, dtype=torch.float32, seed=0):
    """Task vectors of a few integer values: exact ties, zeros and zero sums everywhere."""
    draw = torch.Generator().manual_seed(seed)
    base = {n: torch.randint(-4, 5, s, generator=draw).to(dtype) for n, s in shapes.items()}
    return base, [
        {n: base[n] + torch.randint(-levels, levels + 1, s, generator=draw).to(dtype) for n, s in shapes.items()}
        for _ in range(num_tasks)
    ]


def inputs_of(method, base, models):
    """What the method takes: no base, or one or two models, for those that need no more."""
    models = models[: {"slerp": 2, "passthrough": 1}.get(method, len(models))]
    return (None if method in WITHOUT_BASE else base), models


def assert_matches_reference(base, models, **keywords) -> dict[str, Tensor]:
    actual = peta_fast.merge_state_dicts(base, models, **keywords)
    exact = merge_with_terms(base, models, **keywords)
    assert set(actual) == set(exact)
    for name, tensor in actual.items():
        assert tensor.dtype == (base or models[0])[name].dtype, name
        assert_close_to_reference(tensor, exact[name], len(models))
    return actual


def bits(tensor: Tensor) -> Tensor:
    """The tensor's bytes, which tell -0.0 from 0.0."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(actual) == set(expected)
    for name, tensor in actual.items():
        assert tensor.dtype == expected[name].dtype and tensor.shape == expected[name].shape, name
        assert torch.equal(bits(tensor), bits(expected[name])), name
