"""What goes through the layers of a model: rows of inputs, and gradients of outputs, caught by hooks.

layer                                  rows                        weight as a matrix
nn.Linear                              x [*, in]                   [out, in]
Conv1D of transformers                 x [*, in]                   [in, out], transposed
nn.Conv2d, one group, zero padding     patches [*, C kh kw]        [out, C kh kw]
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional


def is_transposed(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_layer(module: nn.Module) -> bool:
    """Whether Gram matrices can be made of what goes through."""
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return isinstance(module, nn.Linear) or is_transposed(module)


def layers_of(model: nn.Module, wanted: Callable[[str], bool] | None = None) -> dict[str, nn.Module]:
    """The layers by name, in the model's order; one module that has two names goes by the first."""
    return {n: m for n, m in model.named_modules() if is_layer(m) and (wanted is None or wanted(n))}


def sides(module: nn.Module) -> tuple[int, int]:
    """(in, out): the sides of its Gram matrices."""
    rows, columns = module.weight.shape[0], module.weight[0].numel()
    return (rows, columns) if is_transposed(module) else (columns, rows)


def input_rows(module: nn.Module, x: Tensor) -> Tensor:
    """[*, in]: what one output is made of, in each row."""
    if not isinstance(module, nn.Conv2d):
        return x
    patches = functional.unfold(
        x if x.dim() == 4 else x[None], module.kernel_size, module.dilation, module.padding, module.stride
    )
    return patches.transpose(1, 2)


def output_rows(module: nn.Module, gradient: Tensor) -> Tensor:
    """[*, out]"""
    return gradient.flatten(-2).transpose(-1, -2) if isinstance(module, nn.Conv2d) else gradient


@contextlib.contextmanager
def evaluating(
    model: nn.Module, *, gradients: bool = False, only: Callable[[str], bool] | None = None
) -> Iterator[None]:
    """In eval mode, and with gradients of all parameters, or of the named ones, if asked; everything is put back."""
    modes = {module: module.training for module in model.modules()}
    asked = [p for n, p in model.named_parameters() if gradients and (only is None or only(n))]
    frozen = [p for p in asked if not p.requires_grad and p.is_floating_point()]
    model.eval()
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for module, mode in modes.items():
            module.training = mode


@contextlib.contextmanager
def watching(
    modules: dict[str, nn.Module],
    see: Callable[[str, nn.Module, Tensor], None],
    outputs: list[tuple[str, GradientEdge]] | None = None,
) -> Iterator[None]:
    """Calls see(name, module, input) whenever a module runs; notes where the gradients of its outputs will be."""

    def hook(name: str) -> Callable:
        def seen(module: nn.Module, positional: tuple, named: dict, output: Any) -> None:
            see(name, module, positional[0] if positional else next(iter(named.values())))
            if outputs is not None and output.requires_grad:
                outputs.append((name, get_gradient_edge(output)))

        return seen

    handles = [module.register_forward_hook(hook(name), with_kwargs=True) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def gradients_of(losses: Tensor, edges: list[GradientEdge]) -> tuple[Tensor | None, ...]:
    """Of the sum of the losses to each output; no gradient of a weight is computed."""
    return torch.autograd.grad(losses.sum(), edges, allow_unused=True) if edges else ()
