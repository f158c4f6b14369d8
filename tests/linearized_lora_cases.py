"""Layers with random numbers, and the truth about them: torch.func.jvp over a plain LoRA layer in fp64."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn.functional import linear

from peta_fast.ops.linearized_lora import linearized_lora, linearized_lora_dual
from peta_fast.ops.linearized_lora.reference import JvpReference, PlainLoRA

SCALING = 1.75
TRAINED = ("x", "weight", "bias", "dA", "dB")


@dataclass(frozen=True)
class Case:
    """Arguments of linearized_lora; dA and B0 None say that B0 = 0."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    A0: Tensor
    dA: Tensor | None
    B0: Tensor | None
    dB: Tensor

    def tensors(self) -> dict[str, Tensor]:
        return {f.name: t for f in fields(self) if (t := getattr(self, f.name)) is not None}

    def to(self, *arguments) -> Case:
        """Detached, of another dtype or device."""
        return replace(self, **{name: t.detach().to(*arguments) for name, t in self.tensors().items()})

    def training(self, *names: str) -> Case:
        """With fresh leaves that require gradients: the named ones, or all that may."""
        wanted = names or TRAINED
        leaves = {n: t.detach().clone().requires_grad_(n in wanted) for n, t in self.tensors().items()}
        return replace(self, **leaves)

    def zero_B0(self) -> Case:
        """The same layer with B0 = 0, said by leaving out dA and B0."""
        return replace(self, dA=None, B0=None)

    def leaves(self) -> dict[str, Tensor]:
        return {name: t for name, t in self.tensors().items() if t.requires_grad}

    def arguments(self) -> tuple:
        return (self.x, self.weight, self.bias, self.A0, self.dA, self.B0, self.dB)

    def forward(self, **options) -> Tensor:
        return linearized_lora(*self.arguments(), SCALING, **options)

    def dual(self, dx: Tensor | None) -> tuple[Tensor, Tensor]:
        return linearized_lora_dual(self.x, dx, *self.arguments()[1:], SCALING)

    def jvp_reference(self) -> JvpReference:
        """A plain LoRA layer linearized at (A0, B0) and moved by (dA, dB)."""
        B0 = torch.zeros_like(self.dB) if self.B0 is None else self.B0
        reference = JvpReference(PlainLoRA(self.weight, self.bias, self.A0, B0, SCALING))
        with torch.no_grad():
            reference.layer.lora_B += self.dB
            if self.dA is not None:
                reference.layer.lora_A += self.dA
        return reference

    def plain(self) -> Tensor:
        """The formula as one would write it, for its error in low precision."""
        if self.dA is None:
            return linear(self.x, self.weight, self.bias) + SCALING * linear(linear(self.x, self.A0), self.dB)
        first = linear(linear(self.x, self.A0), self.B0 + self.dB)
        return linear(self.x, self.weight, self.bias) + SCALING * (first + linear(linear(self.x, self.dA), self.B0))


def make_case(
    *shape: int, out: int = 7, r: int = 3, b0_is_zero: bool = False, bias: bool = True, seed: int = 0
) -> Case:
    """x [*shape] in fp64, everything of the size that it has in a trained layer."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int, scale: float) -> Tensor:
        return scale * torch.randn(*size, generator=generator, dtype=torch.float64)

    features = shape[-1]
    case = Case(
        x=normal(*shape, scale=1.0),
        weight=normal(out, features, scale=features**-0.5),
        bias=normal(out, scale=0.1) if bias else None,
        A0=normal(r, features, scale=features**-0.5),
        dA=normal(r, features, scale=0.3 * features**-0.5),
        B0=normal(out, r, scale=0.4),
        dB=normal(out, r, scale=0.2),
    )
    return case.zero_B0() if b0_is_zero else case


def gradients(case: Case, y: Tensor, g: Tensor) -> dict[str, Tensor]:
    leaves = case.leaves()
    return dict(zip(leaves, torch.autograd.grad(y, tuple(leaves.values()), g), strict=True))


def jvp_gradients(case: Case, g: Tensor, gdy: Tensor | None = None, dx: Tensor | None = None) -> dict[str, Tensor]:
    """Of the yardstick, under our names; with gdy those of the dual, of which g is y0's."""
    reference = case.jvp_reference()
    x = case.x.detach().clone().requires_grad_()
    step = [p for p in reference.layer.parameters() if p.requires_grad]
    names = ["x", "dA", "dB"]
    if gdy is None:
        found = torch.autograd.grad(reference(x), [x, *step], g)
    else:
        found = torch.autograd.grad(reference.dual(x, dx), [x, *step], [g, gdy])
    return dict(zip(names, found, strict=True))


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    """Within tolerance, relative to the largest value."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    if actual.numel():
        assert torch.isfinite(actual).all()
        scale = max(1.0, expected.abs().max().item())
        assert (actual - expected).abs().max().item() <= tolerance * scale


def assert_as_accurate(actual: Tensor, plain: Tensor, exact: Tensor) -> None:
    """actual: ours; plain: the formula in the same dtype; exact: the formula in fp64."""
    assert actual.dtype == plain.dtype
    ulp = torch.finfo(actual.dtype).eps * exact.abs().max()
    allowed = 2 * (plain.double() - exact).abs().max() + ulp
    assert (actual.double() - exact).abs().max() <= allowed
