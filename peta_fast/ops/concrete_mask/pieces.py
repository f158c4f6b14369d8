"""What the passes of a concrete mask work on: one tensor of a model, with its task vectors and its logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Piece:
    """One tensor of a model, [*S], as the passes see it. What a pass has no use for may be left out.

    task_vectors  T tensors [*S]: fp32, bf16 or fp16 (fp64 in plain PyTorch)
    coefficients  [T] lambda, on the tensors' device
    logits        [*S] fp32, or None: no mask, m = 1
    key           of the noise, uint64
    base          [*S], or None for zeros
    out           [*S], where the merged tensor is written
    g             [*S], the gradient of the merged tensor; in a pass without task vectors, times the merged direction
    mean          0-dimensional fp64, the mask's; found by the pass `means`
    """

    task_vectors: Sequence[Tensor] = field(default_factory=tuple)
    coefficients: Tensor | None = None
    logits: Tensor | None = None
    key: int = 0
    base: Tensor | None = None
    out: Tensor | None = None
    g: Tensor | None = None
    mean: Tensor | None = None
    table: tuple | None = field(default=None, repr=False)
    """The task vectors' addresses on the device, kept from launch to launch."""

    @property
    def tensors(self) -> list[Tensor]:
        """All of them that are there."""
        return [*self.task_vectors, *(t for t in (self.logits, self.base, self.out, self.g) if t is not None)]

    @property
    def size(self) -> int:
        return self.tensors[0].numel()


@dataclass(frozen=True)
class Adam:
    """One step of Adam without weight decay; `step` counts from 1.

    Source: Kingma and Ba, ICLR 2015; the formulas as torch.optim.Adam has them.
    """

    learning_rate: float
    step: int
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8

    @property
    def rate(self) -> float:
        return self.learning_rate / (1 - self.beta1**self.step)

    @property
    def root(self) -> float:
        """What sqrt(exp_avg_sq) is multiplied by."""
        return (1 - self.beta2**self.step) ** -0.5
