"""Small families of models to fit: a toy on random numbers, and the demonstration's network on real digits."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peta_fast.demo.data import TASKS, Digits, load_digits
from peta_fast.demo.train import FULL, accuracy, base_images, new_model, reproducible, trained
from peta_fast.fit.tasks import Task, entropy


class Toy(nn.Module):
    """x [N, 5] -> logits [N, 4]"""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(5, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


def toy_family(models: int) -> tuple[nn.Module, dict[str, Tensor], list[dict[str, Tensor]]]:
    """model, base and fine-tuned state dicts; the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Toy()
        base = {n: t.clone() for n, t in model.state_dict().items()}
        tuned = [{n: t + 0.5 * torch.randn_like(t) for n, t in base.items()} for _ in range(models)]
    return model, base, tuned


def batches_of(count: int, rows: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [2 * torch.randn(rows, 5, generator=generator) for _ in range(count)]


@dataclass(frozen=True)
class Family:
    """The demonstration's base and a fine-tune for each domain; `model` is there to be overwritten."""

    digits: Digits
    base: dict[str, Tensor]
    tuned: list[dict[str, Tensor]]
    model: nn.Module


@functools.cache
def DIGITS() -> Family:
    digits = load_digits(0)
    with reproducible():
        start = new_model(0)
        base = trained(start, base_images(digits.train, FULL), epochs=20, learning_rate=1e-3, seed=0, advance=int)
        tuned = [
            trained(base, digits.train.seen_as(task), epochs=6, learning_rate=1e-4, seed=1, advance=int).state_dict()
            for task in TASKS
        ]
    return Family(digits, base.state_dict(), tuned, copy.deepcopy(base))


def digits_tasks(family: Family) -> list[Task]:
    """Unlabelled test images of each domain, sixteen at a time."""
    test = family.digits.test
    return [Task(task, test.seen_as(task).pixels.split(16)) for task in TASKS]


@torch.no_grad()
def digits_entropy(family: Family) -> float:
    """Summed over the domains, on all test images, of what family.model holds."""
    return sum(entropy(family.model(family.digits.test.seen_as(t).pixels)).item() for t in TASKS)


def digits_accuracy(family: Family) -> float:
    """Mean over the domains."""
    return sum(accuracy(family.model, family.digits.test.seen_as(t)) for t in TASKS) / len(TASKS)
