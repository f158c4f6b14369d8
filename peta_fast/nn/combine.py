"""Task vectors of linearized adapters, and their sum: task arithmetic in the tangent space.

    step = sum_t w_t (delta_A_t, delta_B_t)

Where the adapters share their point (A0, B0), the sum of their steps is the sum of their weight changes, exactly:
merging in the adapter's space and in the weights' space agree. Where they do not, the sum means nothing and is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from peta_fast.errors import CompatibilityError, RecipeError
from peta_fast.formats.peft_adapter import LinearizedFactors
from peta_fast.nn.model import linearization, some_layers


def task_vector(model: nn.Module, adapter_name: str | None = None) -> dict[str, Tensor]:
    """Copies of an adapter's steps, "<module>.delta_A" and "<module>.delta_B"; None means the active adapter.

    Adapters of one linearization point: their task vectors add up.
    """
    if hasattr(model, "peft_config"):
        return in_peft().task_vector(model, adapter_name)
    found = some_layers(model)
    return {
        f"{name}.{part}": step
        for name, layer in found.items()
        if adapter_name is None or adapter_name in layer.adapter_names
        for part, step in layer.task_vector(adapter_name).items()
    }


def add_adapters(model: nn.Module, weights: Mapping[str, float], adapter_name: str) -> None:
    """Makes a new, inactive adapter: the weighted sum of the steps of others, at their common linearization point.

        add_adapters(model, {"sst2": 0.3, "rte": 0.3}, "both")

    weights  adapter -> what its task vector is multiplied by
    Raises CompatibilityError, naming layer and adapters, where the linearization points or scalings differ.
    """
    if not weights:
        raise RecipeError("add_adapters", "got no adapters", "Give a mapping such as {'sst2': 0.5, 'rte': 0.5}.")
    if hasattr(model, "peft_config"):
        in_peft().add_adapters(model, weights, adapter_name)
        return
    parts = {name: linearization(model, name).modules for name in weights}
    for module, layer in some_layers(model).items():
        terms = {name: modules[module] for name, modules in parts.items() if module in modules}
        if terms:
            dropout = layer.adapter(next(iter(terms))).dropout
            total = weighted_sum(module, terms, weights)
            layer.add_factors(adapter_name, total, dropout=dropout, adapter_dtype=total.delta_B.dtype)


def in_peft():
    """The same for a PeftModel; peft is an extra."""
    from peta_fast.nn import peft_layer

    return peft_layer


@torch.no_grad()
def weighted_sum(
    module: str, terms: Mapping[str, LinearizedFactors], weights: Mapping[str, float]
) -> LinearizedFactors:
    """The sum of the steps in fp32 (fp64 for fp64 adapters), rounded once to the adapters' dtype."""
    (first, point), *others = terms.items()
    for name, factors in others:
        check_same_point(module, first, point, name, factors)

    def total(part: str) -> Tensor | None:
        steps = [(weights[name], getattr(factors, part)) for name, factors in terms.items()]
        if steps[0][1] is None:
            return None
        dtype = torch.promote_types(steps[0][1].dtype, torch.float32)
        return sum(weight * step.to(dtype) for weight, step in steps).to(steps[0][1].dtype)

    return replace(point, delta_A=total("delta_A"), delta_B=total("delta_B"))


def check_same_point(module: str, first: str, a: LinearizedFactors, second: str, b: LinearizedFactors) -> None:
    """Raises CompatibilityError where (A0, B0, scaling) of two adapters of one module differ."""
    who = f"{module}: adapters {first!r} and {second!r}"
    if a.r != b.r:
        problem = f"A0 is {list(a.A0.shape)} and {list(b.A0.shape)}"
    elif a.scaling != b.scaling:
        problem = f"scaling is {a.scaling:g} and {b.scaling:g}"
    elif not torch.equal(a.A0, b.A0) or (a.B0 is None) != (b.B0 is None):
        problem = "A0 or B0 is not the same tensor of numbers"
    elif a.B0 is not None and not torch.equal(a.B0, b.B0):
        problem = "B0 is not the same tensor of numbers"
    else:
        return
    raise CompatibilityError(
        who,
        f"they are linearized around different points: {problem}",
        "Their steps do not add up. Train them from one point (linearize with one seed, r and alpha), or merge their "
        "weight changes: save both with save_adapter, then `peta-fast adapter merge A B --method cat --out DIR`.",
    )
