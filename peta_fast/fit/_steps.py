"""What fitting loops share: a finite loss or none, a history, progress, and coefficients that learn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peta_fast.errors import PetaFastError, RecipeError
from peta_fast.fit._merged_model import MergedModel

GRANULARITIES = ("task", "layer")


@dataclass(frozen=True)
class Progress:
    """One step of fitting, counted from 1.

    phase   what is being learned: "coefficients" or "masks"
    losses  of the tasks, in their order; loss is their sum
    """

    phase: str
    step: int
    steps: int
    losses: tuple[float, ...]

    @property
    def loss(self) -> float:
        return sum(self.losses)


class History:
    """Collects the steps, tells them to whoever wants to know, and stops at a loss that is not finite."""

    def __init__(self, merged: MergedModel, progress: Callable[[Progress], None] | None):
        self.merged, self.progress = merged, progress
        self.steps: list[Progress] = []

    def note(self, phase: str, step: int, steps: int, losses: Tensor) -> None:
        """Raises PetaFastError, with the step, when one of the losses is NaN or infinite."""
        for task, value in zip(self.merged.tasks, losses.tolist(), strict=True):
            if not abs(value) < float("inf"):
                raise PetaFastError(
                    f"task {task.name!r}",
                    f"its loss is {value} in step {step} of {steps} ({phase}); the model holds the base again, and "
                    "nothing was written",
                    "Look for NaN in its batches, or lower the learning rate.",
                )
        self.phase, self.step, self.of = phase, step, steps
        self.steps.append(Progress(phase, step, steps, tuple(losses.tolist())))
        if self.progress is not None:
            self.progress(self.steps[-1])

    def check(self, gradients: Tensor) -> Tensor:
        """The gradients [tensors, T] of the step noted last; PetaFastError when one of them is not finite."""
        good = torch.isfinite(gradients).all(-1)
        if not good.all():
            name = self.merged.names[int((~good).nonzero()[0])]
            raise PetaFastError(
                name,
                f"its gradient is not finite in step {self.step} of {self.of} ({self.phase}); the model holds the base "
                "again, and nothing was written",
                "Look for NaN in the batches, or lower the learning rate.",
            )
        return gradients


class Coefficients:
    """lambda, one a task ("task") or one a task and tensor ("layer"), learned by Adam.

    clamp  use what lies outside [0, 1] as the nearest of the two, and give it no gradient
    """

    def __init__(
        self, merged: MergedModel, granularity: str, initial: float | Sequence[float], rate: float, clamp: bool
    ):
        if granularity not in GRANULARITIES:
            raise RecipeError("granularity", f"expected one of {', '.join(GRANULARITIES)}, got {granularity!r}")
        self.rows, self.clamp = len(merged.names), clamp
        start = self.spread(initial, merged.count, "initial").to(merged.device)
        self.start = start.expand(1 if granularity == "task" else self.rows, -1)
        self.values = self.start.clone()
        self.optimizer = torch.optim.Adam([self.values], lr=rate)

    @staticmethod
    def spread(values: float | Sequence[float], count: int, who: str) -> Tensor:
        """[count] fp32, from one number or one a model."""
        given = torch.as_tensor(values, dtype=torch.float32)
        if given.dim() > 1 or (given.dim() == 1 and len(given) != count) or not torch.isfinite(given).all():
            raise RecipeError(who, f"expected one finite number or {count}, one a model, got {values!r}")
        return given.expand(count)

    def current(self) -> Tensor:
        """[tensors, T], as the merge uses them."""
        return (self.values.clamp(0, 1) if self.clamp else self.values).expand(self.rows, -1)

    def step(self, gradients: Tensor) -> None:
        """gradients [tensors, T] of the loss with respect to current()"""
        if self.values.shape[0] != self.rows:
            gradients = gradients.sum(0, keepdim=True)
        if self.clamp:
            gradients = torch.where((self.values >= 0) & (self.values <= 1), gradients, 0.0)
        self.values.grad = gradients.to(self.values.dtype)
        self.optimizer.step()

    def reset(self) -> None:
        """Back to the start; the optimizer's moments stay."""
        self.values.copy_(self.start)

    def kept(self) -> dict[str, Tensor]:
        """What a later run needs to go on."""
        return {"values": self.values, **self.optimizer.state[self.values]}

    def restore(self, kept: Mapping[str, Tensor]) -> None:
        """Goes on from what an earlier run has kept, if anything."""
        if kept:
            self.values.copy_(kept["values"])
            moments = {name: t.to(self.values.device) for name, t in kept.items() if name not in ("values", "step")}
            self.optimizer.state[self.values] = {"step": kept["step"], **moments}


def check_positive(**numbers: float) -> None:
    for name, value in numbers.items():
        if not 0 < value < float("inf"):
            raise RecipeError(name, f"expected a positive number, got {value!r}")


def check_steps(**counts: int) -> None:
    for name, value in counts.items():
        if not isinstance(value, int) or value < 0:
            raise RecipeError(name, f"expected a number of steps, got {value!r}")
