"""Tensors under a concrete mask, for tests of the passes, and the same passes in fp64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from philox_reference import uniforms
from torch import Tensor

from peta_fast.ops.concrete_mask.reference import gradients_reference, mask_reference, merge_reference

SEED, DRAW, NAME = 3, 7, "layers.0.weight"
KEY_OF = (SEED, DRAW, NAME)


@dataclass(frozen=True)
class Case:
    """One tensor: base and gradient [*S], task vectors T times [*S], lambda [T], logits [*S]."""

    base: Tensor
    task_vectors: tuple[Tensor, ...]
    coefficients: Tensor
    logits: Tensor
    g: Tensor
    temperature: float = 0.5

    def to(self, dtype: torch.dtype) -> Case:
        vectors = tuple(t.to(dtype) for t in self.task_vectors)
        return replace(self, base=self.base.to(dtype), task_vectors=vectors, g=self.g.to(dtype))

    def exact(self) -> Exact:
        """mask, theta and the gradients of the tensors as they are, in fp64."""
        u = torch.from_numpy(uniforms(*KEY_OF, self.logits.numel())).double().reshape(self.logits.shape)
        u = u.clamp(2.0**-23, 1 - 2.0**-23)
        vectors = [t.double() for t in self.task_vectors]
        logits, coefficients = self.logits.double(), self.coefficients.double()
        mask = mask_reference(logits, u, self.temperature)
        theta = merge_reference(self.base.double(), vectors, coefficients, mask)
        g_logits, g_coefficients = gradients_reference(self.g.double(), vectors, coefficients, mask, self.temperature)
        direction = sum(c * t for c, t in zip(coefficients, vectors, strict=True))
        slopes = mask * (1 - mask) / self.temperature
        terms = (self.g.double() * direction * slopes / mask.mean()).abs()
        return Exact(mask, theta, g_logits, g_coefficients, terms)


@dataclass(frozen=True)
class Exact:
    mask: Tensor
    theta: Tensor
    g_logits: Tensor
    g_coefficients: Tensor
    terms: Tensor
    """What the gradients of the logits are before the mean's own is taken off: they may cancel."""


def make_case(*size: int, tasks: int = 3, temperature: float = 0.5, dtype=torch.float32) -> Case:
    generator = torch.Generator().manual_seed(0)

    def normal(scale: float) -> Tensor:
        return scale * torch.randn(*size, generator=generator)

    vectors = tuple(normal(0.01) for _ in range(tasks))
    coefficients = torch.linspace(-0.1, 0.6, tasks) if tasks > 1 else torch.tensor([0.3])
    case = Case(normal(0.05), vectors, coefficients, normal(2.0), normal(1.0), temperature)
    return case.to(dtype)


def assert_near(actual: Tensor, exact: Tensor, tolerance: float, terms: Tensor | None = None) -> None:
    """Within tolerance of the largest value, or of the largest of the terms that it is a sum of."""
    assert actual.shape == exact.shape
    scale = (exact if terms is None else terms).abs().max().item() if exact.numel() else 0.0
    error = (actual.double() - exact).abs().max().item() if exact.numel() else 0.0
    assert error <= tolerance * scale, f"off by {error / scale:.2e} of the largest"
