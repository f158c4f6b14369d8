"""One adapter's tensors: the frozen point (A0, B0) and the trainable step (delta_A, delta_B) away from it.

    dW = s (B A0 + B0 delta_A),  B = B0 + delta_B;  with B0 = 0 there is no delta_A: dW = s delta_B A0

The parameters are the step itself, zero at the start: an adapter's parameters are its task vector, task arithmetic is
their sum, and weight decay pulls towards the linearization point (A0, B0), not towards the base model.
Source: Tang et al., ICLR 2024, arXiv:2310.04742.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peta_fast.errors import RecipeError
from peta_fast.formats.peft_adapter import LinearizedFactors

INITS = ("lora", "gaussian")
GAUSSIAN_STD = 0.02


@dataclass(frozen=True)
class AdapterSpec:
    """How a new adapter is made.

    r        rank, from 1 to the larger side of the layer
    alpha    scaling = alpha / r, or alpha / sqrt(r) with rslora
    dropout  probability of dropping an element of x on its way to the adapter, while training
    init     "lora": A0 uniform in ±1/sqrt(in), B0 = 0;  "gaussian": A0 and B0 normal with a deviation of 0.02
    seed     of A0 and B0; None takes PyTorch's global generator. Task vectors of one seed live in one space
    dtype    of the adapter's tensors; None is the weight's
    """

    r: int
    alpha: float
    dropout: float = 0.0
    init: str = "lora"
    seed: int | None = None
    rslora: bool = False
    dtype: torch.dtype | None = None

    def check(self, who: str, features_in: int, features_out: int) -> None:
        """Raises RecipeError where a layer of these sizes cannot have such an adapter."""
        sides = f"[{features_out}, {features_in}]"
        if type(self.r) is not int or not 0 < self.r <= max(features_in, features_out):
            problem = f"r is {self.r!r}, expected an integer from 1 to {max(features_in, features_out)}"
            raise RecipeError(who, f"{problem}: the weight is {sides}", "Choose a rank below the layer's sides.")
        if not math.isfinite(self.alpha):
            raise RecipeError(who, f"alpha is {self.alpha!r}, expected a finite number", "A common choice is 2 r.")
        if not 0.0 <= self.dropout < 1.0:
            raise RecipeError(who, f"dropout is {self.dropout!r}, expected 0 <= p < 1")
        if self.init not in INITS:
            raise RecipeError(who, f"init is {self.init!r}, expected one of {', '.join(map(repr, INITS))}")

    def draw(self, features_in: int, features_out: int, name: str = "") -> tuple[Tensor, Tensor | None]:
        """A0 [r, in] and B0 [out, r] or None, fp32 on the CPU: the same on every device. name: the module's."""
        generator = None if self.seed is None else torch.Generator().manual_seed(seed_of(self.seed, name))
        A0, B0 = torch.empty(self.r, features_in), None
        if self.init == "lora":
            bound = 1 / math.sqrt(features_in)
            A0.uniform_(-bound, bound, generator=generator)
        else:
            A0.normal_(0, GAUSSIAN_STD, generator=generator)
            B0 = torch.empty(features_out, self.r).normal_(0, GAUSSIAN_STD, generator=generator)
        return A0, B0


def seed_of(seed: int, name: str) -> int:
    """A seed for one module of a model, so that no two modules begin alike and their order does not matter."""
    if not name:
        return seed
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def scaling_of(r: int, alpha: float, rslora: bool) -> float:
    return alpha / math.sqrt(r) if rslora else alpha / r


class LinearizedAdapter(nn.Module):
    """Buffers A0 [r, in], B0 [out, r]; parameters delta_A [r, in], delta_B [out, r]. B0 None means B0 = 0."""

    def __init__(self, A0: Tensor, B0: Tensor | None, features_out: int, **settings):
        super().__init__()
        self._set_point(A0, B0, features_out, **settings)

    def _set_point(
        self,
        A0: Tensor,
        B0: Tensor | None,
        features_out: int,
        *,
        alpha: float,
        rslora: bool = False,
        dropout: float = 0.0,
    ) -> None:
        self.r, self.alpha, self.rslora, self.dropout = A0.shape[0], alpha, rslora, dropout
        self.scaling = scaling_of(self.r, alpha, rslora)
        self.register_buffer("A0", A0)
        self.register_buffer("B0", B0)
        self.delta_A = None if B0 is None else nn.Parameter(torch.zeros_like(A0))
        self.delta_B = nn.Parameter(A0.new_zeros(features_out, self.r))

    @property
    def b0_is_zero(self) -> bool:
        return self.B0 is None

    def steps(self) -> list[nn.Parameter]:
        """The trainable parameters."""
        return [p for p in (self.delta_A, self.delta_B) if p is not None]

    def factors(self) -> LinearizedFactors:
        return LinearizedFactors(self.A0, self.B0, self.delta_A, self.delta_B, self.scaling, self.alpha, self.rslora)


def stack(adapters: Sequence[LinearizedFactors]) -> LinearizedFactors:
    """One adapter that is the sum of several: their ranks side by side, each scaling folded into its B."""
    if len(adapters) == 1:
        return adapters[0]
    A0 = torch.cat([a.A0 for a in adapters])
    delta_B = torch.cat([a.scaling * a.delta_B for a in adapters], 1)
    if all(a.B0 is None for a in adapters):
        return LinearizedFactors(A0, None, None, delta_B, 1.0, float(A0.shape[0]))
    delta_A = torch.cat([torch.zeros_like(a.A0) if a.delta_A is None else a.delta_A for a in adapters])
    B0 = torch.cat([torch.zeros_like(a.delta_B) if a.B0 is None else a.scaling * a.B0 for a in adapters], 1)
    return LinearizedFactors(A0, B0, delta_A, delta_B, 1.0, float(A0.shape[0]))


def weight_change(factors: LinearizedFactors) -> Tensor:
    """dW [out, in] = s (B A0 + B0 delta_A), in fp32 (fp64 for fp64 adapters)."""
    dtype = torch.promote_types(factors.delta_B.dtype, torch.float32)
    A0, delta_B = factors.A0.to(dtype), factors.delta_B.detach().to(dtype)
    if factors.B0 is None or factors.delta_A is None:
        return factors.scaling * (delta_B @ A0)
    B0 = factors.B0.to(dtype)
    return factors.scaling * ((B0 + delta_B) @ A0 + B0 @ factors.delta_A.detach().to(dtype))
