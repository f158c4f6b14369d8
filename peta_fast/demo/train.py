"""Training and scoring on the CPU, the same on every run.

The base learns upright digits, and with them a handful of labelled images of each task's domain, as a foundation
model has seen a little of everything. Each fine-tune starts from the base and sees its own domain alone, with a
tenth of the base's learning rate: small steps from a shared start are what makes task vectors add up.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional

from peta_fast.demo.data import TASKS, Images, mix
from peta_fast.demo.model import DigitsMLP

BATCH = 100
LABEL_SMOOTHING = 0.1
WEIGHT_DECAY = 0.01


@dataclass(frozen=True)
class Regime:
    """How long and how fast. few_per_digit: labelled images a digit of each task's domain that the base sees."""

    base_epochs: int
    task_epochs: int
    base_learning_rate: float = 1e-3
    task_learning_rate: float = 7e-5
    few_per_digit: int = 3
    adapter_learning_rate: float = 2e-3


FULL = Regime(base_epochs=40, task_epochs=12)
QUICK = Regime(base_epochs=8, task_epochs=3, task_learning_rate=2e-4, few_per_digit=6)


@contextlib.contextmanager
def reproducible() -> Iterator[None]:
    """One thread and deterministic algorithms, since sums of another order round otherwise; restored afterwards.

    Matrices of this size gain nothing from a second thread.
    """
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)


def base_images(train: Images, regime: Regime) -> Images:
    """What the base sees: all upright images, and few_per_digit images a digit of every task's domain."""
    few = train.few_per_digit(regime.few_per_digit)
    return mix([train, *(few.seen_as(task) for task in TASKS)])


def new_model(seed: int) -> DigitsMLP:
    """Freshly initialized; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DigitsMLP()


def steps(images: Images, epochs: int) -> int:
    """Optimizer steps that `trained` takes."""
    return epochs * -(-len(images) // BATCH)


def trained(
    start: DigitsMLP, images: Images, *, epochs: int, learning_rate: float, seed: int, advance: Callable[[], None],
    weight_decay: float = WEIGHT_DECAY,
) -> DigitsMLP:  # fmt: skip
    """A trained copy of `start`: AdamW, cosine schedule, smoothed cross-entropy. advance() is called every step."""
    model = copy.deepcopy(start).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps(images, epochs))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=generator).split(BATCH):
            logits = model(images.pixels[batch])
            loss = functional.cross_entropy(logits, images.labels[batch], label_smoothing=LABEL_SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            advance()
    return model.eval()


@torch.inference_mode()
def accuracy(model: DigitsMLP, images: Images) -> float:
    """Fraction of images whose digit is recognized, in [0, 1]."""
    return (model.eval()(images.pixels).argmax(-1) == images.labels).double().mean().item()
