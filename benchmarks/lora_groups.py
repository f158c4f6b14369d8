"""Several linearized LoRA layers of one x, together and one by one, as PEFT's LoRA, and without adapters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from lora_layers import SCALING, Layers, Shape
from torch import Tensor

from peta_fast.ops.linearized_lora import Projection, linearized_lora_group

Function = Callable[[Tensor], list[Tensor]]


@dataclass(frozen=True)
class GroupShape:
    """x [M, K], weights [N, K], rank r; general: B0 is not 0."""

    M: int
    K: int
    outs: tuple[int, ...]
    r: int
    general: bool = False

    def __str__(self) -> str:
        outs = "+".join(map(str, self.outs))
        return f"M{self.M}-K{self.K}-N{outs}-r{self.r}-{'general' if self.general else 'b0_is_zero'}"


class Groups:
    """The same layers in all ways, each a function x -> every y; x is theirs together."""

    def __init__(self, shape: GroupShape, device: str, dtype: torch.dtype):
        self.shape = shape
        self.layers = [Layers(Shape(shape.M, shape.K, N, shape.r, shape.general), device, dtype) for N in shape.outs]
        for i, layer in enumerate(self.layers):
            layer.weight = layer.weight.roll(i)
        self.x = self.layers[0].x

    def ours(self) -> Function:
        projections = [
            Projection(la.weight, la.bias, la.A0, la.dA, la.B0, la.dB, SCALING) for la in self.layers
        ]  # fmt: skip
        return lambda x: list(linearized_lora_group(x, projections))

    def single(self) -> Function:
        return each(la.ours() for la in self.layers)

    def bare(self) -> Function:
        return each(la.bare() for la in self.layers)

    def peft(self) -> Function | None:
        found = [la.peft() for la in self.layers]
        return None if None in found else each(found)

    def forward(self, function: Function) -> Callable[[], list[Tensor]]:
        def run() -> list[Tensor]:
            with torch.no_grad():
                return function(self.x)

        return run

    def forward_backward(self, function: Function) -> Callable[[], list[Tensor]]:
        """The gradient of x, since a layer in the middle of a model passes one on, and of what they train."""
        gs = [la.g for la in self.layers]

        def run() -> list[Tensor]:
            self.x.grad = None
            ys = function(self.x)
            torch.autograd.backward(ys, gs)
            return ys

        return run

    def error(self, function: Function) -> float:
        """Largest |found - exact| / |exact|max of every y and of all gradients, against the jvp in fp64."""
        x = self.x.detach().double().requires_grad_()
        exact = [la.jvp(torch.float64) for la in self.layers]
        ys_exact = [layer(x) for layer in exact]
        factors = [p for layer in exact for p in ((layer.layer.lora_A,) * self.shape.general + (layer.layer.lora_B,))]
        steps = [t for la in self.layers for t in (la.dA, la.dB) if t is not None]
        gs = [la.g for la in self.layers]
        truths = [*ys_exact, *torch.autograd.grad(ys_exact, [x, *factors], [g.double() for g in gs])]
        ys = function(self.x)
        founds = [*ys, *torch.autograd.grad(ys, [self.x, *steps], gs)]
        return max(((f.double() - t).abs().max() / t.abs().max()).item() for f, t in zip(founds, truths, strict=True))


def each(functions) -> Function:
    functions = list(functions)
    return lambda x: [function(x) for function in functions]
