"""How nearly a fine-tune stays in the tangent space of its base: the two properties of the kernel regime.

    linearization error  |f(x; theta_t) - f_lin(x; theta_t)| / |f(x; theta_t) - f(x; theta0)|
    feature change       |J(x; theta_t) tau - J(x; theta0) tau| / |J(x; theta0) tau|

Both are 0 for a model that is linear in its weights, as a linearized one is. Cost: two passes with tangents a model.
Source: Malladi et al., ICML 2023, arXiv:2210.05643, as Jin et al., ICLR 2025, arXiv:2407.07089, measure it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from peta_fast.analysis import plots
from peta_fast.analysis.figures import Figure
from peta_fast.analysis.task_vectors import labels_of
from peta_fast.errors import RecipeError


@dataclass(frozen=True)
class Linearized:
    """One fine-tune. Accuracies are None without labels: of the fine-tune, its post-hoc linearization, and the base."""

    error: float
    feature_change: float
    plain_accuracy: float | None = None
    linear_accuracy: float | None = None
    base_accuracy: float | None = None


@dataclass(frozen=True)
class LinearizationErrors:
    models: Mapping[str, Linearized]

    def figures(self) -> list[Figure]:
        names, found = list(self.models), list(self.models.values())
        groups = {
            "linearization error": np.array([f.error for f in found]),
            "feature change": np.array([f.feature_change for f in found]),
        }
        if all(f.plain_accuracy is not None for f in found):
            groups |= {
                "accuracy": np.array([f.plain_accuracy for f in found]),
                "accuracy, linearized": np.array([f.linear_accuracy for f in found]),
            }
        return [
            Figure(
                "linearization",
                "Distance from the tangent space",
                "Relative error of the first-order expansion around the base, and relative change of its features "
                "along the task vector. 0: the fine-tune stayed in the kernel regime.",
                ("model", "linearization error", "feature change", "accuracy", "accuracy linearized", "accuracy base"),
                [(n, f.error, f.feature_change, f.plain_accuracy, f.linear_accuracy, f.base_accuracy)
                 for n, f in self.models.items()],
                lambda figure: plots.bars(figure, names, groups, axis="ratio"),
            )
        ]  # fmt: skip


def linearization_error(
    model: Any,
    tuned: Sequence[Mapping[str, Any]],
    inputs: Sequence[Any],
    *,
    names: Sequence[str] | None = None,
    labels: Sequence[Any] | None = None,
) -> LinearizationErrors:
    """Compares fine-tunes with their first-order expansion around `model`.

    model   nn.Module with the base's weights; it is copied, and evaluated in eval mode
    tuned   T state dicts, or dicts of what was trained
    inputs  T inputs, one a fine-tune: a tensor, a tuple of arguments or a dict of keyword arguments
    labels  T tensors [n], for accuracies; the model returns logits then

    What the model returns is compared, the first floating tensor of it. Raises RecipeError when the numbers of inputs
    or labels do not fit, or a fine-tune does the same as the base: the error is 0/0 then.
    """
    if len(inputs) != len(tuned) or (labels is not None and len(labels) != len(tuned)):
        got = f"{len(tuned)} models, {len(inputs)} inputs" + (f", {len(labels)} labels" if labels is not None else "")
        raise RecipeError("linearization_error", f"expected one input, and one tensor of labels, a model; got {got}")
    names = labels_of([f"model {t}" for t in range(len(tuned))], names)
    truth = labels if labels is not None else [None] * len(tuned)
    found = {n: _compare(model, s, x, y, n) for n, s, x, y in zip(names, tuned, inputs, truth, strict=True)}
    return LinearizationErrors(found)


def _compare(model, state: Mapping[str, Any], given: Any, labels, name: str) -> Linearized:
    import torch

    from peta_fast.nn.tangent import TangentModel

    args, kwargs = ((), given) if isinstance(given, Mapping) else (given if isinstance(given, tuple) else (given,), {})
    with torch.no_grad():
        at_base = TangentModel(copy.deepcopy(model), state)
        base, along = (_first(output) for output in at_base.dual(*args, **kwargs))
        moved = copy.deepcopy(model)
        moved.load_state_dict({**moved.state_dict(), **state})
        at_tuned = TangentModel(moved, state)
        for key, step in at_tuned.step.items():
            step.copy_(at_base.step[key])
        plain, along_tuned = (_first(output) for output in at_tuned.dual(*args, **kwargs))
        change, along_norm = (plain - base).double().norm(), along.double().norm()
        if not float(change) or not float(along_norm):
            raise RecipeError(name, "does the same as the base on these inputs: nothing to compare")
        error = float((plain - base - along).double().norm() / change)
        feature_change = float((along_tuned - along).double().norm() / along_norm)
        scores = [None] * 3 if labels is None else [_accuracy(y, labels) for y in (plain, base + along, base)]
    return Linearized(error, feature_change, *scores)


def _first(output: Any):
    """The first floating tensor of what a model returns."""
    import torch
    from torch.utils import _pytree

    leaves = [leaf for leaf in _pytree.tree_leaves(dict(output) if isinstance(output, Mapping) else output)
              if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]  # fmt: skip
    if not leaves:
        raise RecipeError("linearization_error", "the model returns no floating tensor")
    return leaves[0]


def _accuracy(logits, labels) -> float:
    return (logits.argmax(-1) == labels).double().mean().item()
