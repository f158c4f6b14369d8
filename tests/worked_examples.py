"""Merges that can be checked on paper. The references and the engine must both reproduce them to 1e-6.

Each example merges one tensor "w"; unless a base is given, it is zero and the models are the task vectors themselves.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

TEN_PARAMETERS = [
    [1, -0.2, 0.5, -0.9, 0.1, 0, 0.3, -0.4, 0.7, -0.6],
    [-0.8, 0.3, 0.5, 0.6, -0.2, 0, -0.3, 0.9, 0.1, -0.7],
    [0.4, -0.1, -1, 0.3, 0.2, 0, 0, -0.5, 0.8, -0.5],
]
THREE_BY_FOUR = [[4, -1, 2, 0], [-2, 3, 2, -1], [1, -4, -4, 2]]
"""At density 0.5 the second task keeps [-2 3 2 .] with all ties, [-2 3 . .] with the first of them."""
CANCELLING = [[1, 2, -3], [-1, 1, -1]]
ONE_ROW = [0.9, -0.05, 0.4, -0.3, 0.02, 0.6, -0.7, 0.15, -0.25, 0.5]
SOFT_MASK = [0.5, 0.575763, 0.916403, 0.402647]


class Example(NamedTuple):
    name: str
    keywords: dict[str, Any]
    models: list[list[float]]
    expected: list[float]
    base: list[float] | None = None
    tolerance: float = 1e-6

    def state_dicts(self) -> tuple[dict[str, Tensor] | None, list[dict[str, Tensor]]]:
        """base and models in fp32; no base for the methods that know none."""
        models = [{"w": torch.tensor(m, dtype=torch.float32)} for m in self.models]
        if self.keywords["method"] in ("linear", "slerp", "passthrough"):
            return None, models
        return {"w": torch.tensor(self.base or [0.0] * len(self.models[0]))}, models


def ties(name, models, expected, **keywords) -> Example:
    return Example(f"ties-{name}", {"method": "ties", **keywords}, models, expected)


def breadcrumbs(compat, gamma, kept) -> Example:
    keywords = {"method": "breadcrumbs", "compat": compat, "density": 0.6, "gamma": gamma}
    return Example(f"breadcrumbs-{compat}-gamma-{gamma}", keywords, [ONE_ROW], [v if v in kept else 0 for v in ONE_ROW])


WITHOUT_THE_LARGEST = {0.4, -0.3, 0.6, -0.7, -0.25, 0.5}
WITH_THE_LARGEST = {0.9, 0.4, -0.3, 0.6, -0.7, 0.5}

EXAMPLES = [
    Example("linear", {"method": "linear", "weight": [3, 1]}, [[1, 4], [5, -4]], [2, 2]),
    Example("linear-sum", {"method": "linear", "weight": [3, 1], "normalize": False}, [[1, 4], [5, -4]], [8, 8]),
    Example("passthrough", {"method": "passthrough", "scale": -2}, [[1, -2]], [-2, 4]),
    Example("slerp", {"method": "slerp", "t": 0.25}, [[1, 0], [0, 2]], [0.9238795, 0.7653669]),
    Example("slerp-parallel", {"method": "slerp", "t": 0.25}, [[1, 2], [2, 4]], [1.25, 2.5]),
    Example("slerp-opposite", {"method": "slerp", "t": 0.25}, [[1, 2], [-1, -2]], [0.5, 1]),
    Example("slerp-zero", {"method": "slerp", "t": 0.25}, [[1, 2], [0, 0]], [0.75, 1.5]),
    Example(
        "task-arithmetic-normalized",
        {"method": "task_arithmetic", "weight": [1, 2, 1], "normalize": True},
        THREE_BY_FOUR,
        [0.25, 0.25, 0.5, 0],
    ),
    Example(
        "task-arithmetic-normalized-weights-cancel",
        {"method": "task_arithmetic", "weight": [1, 2, -3], "normalize": True},
        THREE_BY_FOUR,
        [-3, 17, 18, -8],
    ),
    ties(
        "authors-mean-of-a-fifth",
        TEN_PARAMETERS,
        [1, 0, -1, -0.9, 0, 0, 0, 0.9, 0.75, -0.6],
        compat="ties-authors",
        density=0.2,
    ),
    ties(
        "authors-sum-of-a-fifth",
        TEN_PARAMETERS,
        [1, 0, -1, -0.9, 0, 0, 0, 0.9, 1.5, -1.2],
        compat="ties-authors",
        density=0.2,
        merge_func="sum",
    ),
    ties(
        "authors-max-of-a-fifth",
        TEN_PARAMETERS,
        [1, 0, -1, -0.9, 0, 0, 0, 0.9, 0.8, -0.7],
        compat="ties-authors",
        density=0.2,
        merge_func="max",
    ),
    ties(
        "authors-half-as-fp32-elects",
        TEN_PARAMETERS,
        [0.7, 0.3, 0.5, 0.45, 0, 0, -0.3, -0.45, 0.75, -0.6],
        compat="ties-authors",
        density=0.5,
    ),
    ties(
        "mergekit-half", TEN_PARAMETERS, [0.7, 0, 0.5, -0.9, 0, 0, 0, 0.9, 0.75, -0.6], compat="mergekit", density=0.5
    ),
    ties("native-half", TEN_PARAMETERS, [0.7, 0, 0, -0.9, 0, 0, 0, 0.9, 0.75, -0.6], density=0.5),
    ties("native-three-by-four", THREE_BY_FOUR, [4, -4, 0, 0], density=0.5),
    ties("native-weighted", THREE_BY_FOUR, [0, 3, 2, 0], density=0.5, weight=[1, 2, 0.5]),
    ties("native-weighted-sum", THREE_BY_FOUR, [0, 6, 6, 0], density=0.5, weight=[1, 2, 0.5], normalize=False),
    ties("mergekit-three-by-four", THREE_BY_FOUR, [4, -4, -4, 0], compat="mergekit", density=0.5),
    ties("mergekit-weighted", THREE_BY_FOUR, [4, 3, 2, 0], compat="mergekit", density=0.5, weight=[1, 2, 0.5]),
    ties(
        "mergekit-weighted-sum",
        THREE_BY_FOUR,
        [4, 6, 2, 0],
        compat="mergekit",
        density=0.5,
        weight=[1, 2, 0.5],
        normalize=False,
    ),
    ties("peft-weighted", THREE_BY_FOUR, [4, -2, -2, 0], compat="peft", density=0.5, weight=[1, 2, 0.5]),
    ties("native-zero-sum-leaves-the-base", CANCELLING, [0, 1.5, -2], density=1),
    ties("mergekit-zero-sum-is-plus", CANCELLING, [1, 1.5, -2], compat="mergekit", density=1),
    ties("peft-zero-sum-is-plus", CANCELLING, [1, 1.5, -2], compat="peft", density=1),
    ties("peta-zero-majority-is-plus", CANCELLING, [1, 1.5, -2], compat="peta", density=1),
    ties(
        "authors-zero-majority-is-minus",
        [[*t, 0] for t in CANCELLING],
        [-1, 1.5, -2, 0],
        compat="ties-authors",
        density=0.75,
    ),
    ties("agreeing-weights-cancel", [[2, 1], [-3, 2], [0, 5]], [-5, 3.5], density=1, weight=[-1, 1, 1]),
    breadcrumbs("native", 0.1, WITHOUT_THE_LARGEST),
    breadcrumbs("mergekit", 0.1, WITHOUT_THE_LARGEST),
    breadcrumbs("mergekit-0.1.4", 0.1, WITHOUT_THE_LARGEST),
    breadcrumbs("native", 0.01, WITH_THE_LARGEST),
    breadcrumbs("mergekit", 0.01, WITH_THE_LARGEST),
    breadcrumbs("mergekit-0.1.4", 0.01, set()),
    Example(
        "breadcrumbs-native-keeps-all-equals",
        {"method": "breadcrumbs", "density": 0.4, "gamma": 0.2},
        [[3, 1, 1, 1, 0.5]],
        [0, 1, 1, 1, 0],
    ),
    Example(
        "breadcrumbs-mergekit-keeps-the-first-of-equals",
        {"method": "breadcrumbs", "compat": "mergekit", "density": 0.4, "gamma": 0.2},
        [[3, 1, 1, 1, 0.5]],
        [0, 1, 1, 0, 0],
    ),
    Example(
        "soft-mask-divided-by-its-mean",
        {
            "method": "masked_task_arithmetic",
            "weight": 1,
            "mask": {"w": torch.tensor(SOFT_MASK)},
            "mask_rescale": "mean",
            "scaling": 0.3,
        },
        [[1.1, -1.8, 0.4, 4]],
        [0.350541, -0.377010, 0.129597, 0.807038],
        base=[0.1, 0.2, -0.1, 0],
        tolerance=3e-6,
    ),
    Example(
        "masks-of-each-task",
        {
            "method": "masked_task_arithmetic",
            "mask": {"0/w": torch.tensor([True, False, True, False]), "1/w": torch.tensor([0, 1, 0, 0]).byte()},
            "mask_rescale": "mean",
        },
        THREE_BY_FOUR[:2],
        [8, 12, 4, 0],
    ),
    Example(
        "a-mask-that-keeps-nothing",
        {"method": "masked_task_arithmetic", "mask": {"w": torch.zeros(4)}, "mask_rescale": "mean"},
        THREE_BY_FOUR,
        [0, 0, 0, 0],
    ),
]
