"""mergekit's `sparsify` in terms of ours, so that mergekit's own tests of it can be run against this package.

As a pytest plugin it stands in for the module `mergekit.sparsify`, installed or not. In this repository's root, with
a copy of mergekit's repository:

    PYTHONPATH=tests pytest -p mergekit_adapter -k "not test_zero_density" MERGEKIT/tests/test_sparsify.py

`test_zero_density` expects an assertion that mergekit 0.1.5 itself no longer makes.
"""

from __future__ import annotations

import enum
import itertools
import sys
from types import ModuleType

import torch
from torch import Tensor

import peta_fast


class SparsificationMethod(enum.Enum):
    magnitude = "ties"
    magnitude_outliers = "breadcrumbs"
    random = "dare_linear"
    della_magprune = "della_linear"


RANDOM = ("dare_linear", "della_linear")
NORMS = {"l1": 1, "l2": 2, "linf": torch.inf}
SMALLEST_NORM = 1e-7
KEYS = {"ties": (), "breadcrumbs": ("gamma",), "dare_linear": (), "della_linear": ("epsilon",)}
SEEDS = itertools.count()


def sparsify(
    tensor: Tensor,
    density: float,
    method: SparsificationMethod,
    gamma: float = 0.0,
    rescale_norm: str | None = None,
    epsilon: float = 0.15,
    compat: str = "mergekit",
) -> Tensor:
    """A task vector [*S] with all but about `density` of its entries set to 0: one model, merged into a base of zeros.

    rescale_norm  the norm of `tensor` that the result is to have again, "l1", "l2" or "linf"

    Each call draws with the next seed.
    """
    keys = {key: value for key, value in (("gamma", gamma), ("epsilon", epsilon)) if key in KEYS[method.value]}
    if method.value in RANDOM:
        keys |= {"rescale": rescale_norm == "l1", "seed": next(SEEDS)}
    kept = _merged(tensor, method.value, compat, density=density, **keys)
    if rescale_norm is None or keys.get("rescale"):
        return kept
    before, after = _norm(tensor, rescale_norm), _norm(kept, rescale_norm)
    scaling = before / after if min(before, after) > SMALLEST_NORM else 1.0
    return _merged(tensor, method.value, compat, density=density, scaling=scaling, **keys)


def _merged(tensor: Tensor, method: str, compat: str, **keys) -> Tensor:
    base, model = {"delta": torch.zeros_like(tensor)}, {"delta": tensor}
    return peta_fast.merge_state_dicts(base, [model], method=method, compat=compat, weight=1.0, **keys)["delta"]


def _norm(tensor: Tensor, name: str) -> float:
    return torch.linalg.vector_norm(tensor.double(), NORMS[name]).item() if tensor.numel() else 0.0


def pytest_configure() -> None:
    """Puts this module's names where mergekit's tests import them from."""
    stand_in = ModuleType("mergekit.sparsify")
    stand_in.sparsify, stand_in.SparsificationMethod = sparsify, SparsificationMethod
    sys.modules["mergekit"], sys.modules[stand_in.__name__] = ModuleType("mergekit"), stand_in
