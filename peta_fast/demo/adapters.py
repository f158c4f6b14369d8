"""LoRA against linearized LoRA when tasks are merged: the paper's figure 5, on the demonstration's digits.

Both start from one point (A0, B0) for all tasks, train the same number of steps, and are merged as adapters:
phi = phi0 + lambda * merge of (phi_t - phi0). Every subset of two or more tasks is merged; the score of a merge is the
mean over all tasks, merged or not, of accuracy / accuracy of the task's own fine-tune of the same kind.
Source: Tang et al., ICLR 2024, arXiv:2310.04742, figure 5; there lambda is chosen on the test images.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from peta_fast.demo.data import TASKS, Digits, Images
from peta_fast.demo.model import DigitsMLP, load_checkpoint
from peta_fast.demo.train import Regime, accuracy, trained
from peta_fast.merging import merge_state_dicts
from peta_fast.nn import LinearizedLoRALinear, linearize, save_adapter

RANK, ALPHA = 8, 16
TARGETS = ("fc1", "fc2")
METHODS: dict[str, dict[str, float]] = {"task_arithmetic": {}, "ties": {"density": 0.2}}
"""How adapters are merged -> the method's keys."""


@dataclass(frozen=True)
class Kind:
    """A way to fine-tune. init "lora": B0 = 0, and linearized LoRA trains B alone; "gaussian": A0 and B0 random."""

    name: str
    linearized: bool
    init: str


KINDS = (
    Kind("LoRA", False, "lora"),
    Kind("L-LoRA", True, "lora"),
    Kind("LoRA B0≠0", False, "gaussian"),
    Kind("L-LoRA B0≠0", True, "gaussian"),
)


@dataclass(frozen=True)
class Merged:
    """Adapters of `tasks` merged by `method`. scaling: chosen on validation; normalized: score on the test images."""

    kind: str
    method: str
    tasks: tuple[str, ...]
    scaling: float
    normalized: float
    mean_accuracy: float


@dataclass(frozen=True)
class AdapterResult:
    """own: kind -> task -> test accuracy of the task's own fine-tune."""

    own: Mapping[str, Mapping[str, float]]
    base: Mapping[str, float]
    merged: tuple[Merged, ...]

    def own_mean(self, kind: str) -> float:
        return statistics.fmean(self.own[kind].values())

    def of(self, kind: str, method: str, count: int) -> list[Merged]:
        return [m for m in self.merged if (m.kind, m.method, len(m.tasks)) == (kind, method, count)]

    def counts(self) -> list[int]:
        return sorted({len(m.tasks) for m in self.merged})

    def mean_and_spread(self, kind: str, method: str, count: int) -> tuple[float, float]:
        """Of the normalized score over all subsets of that many tasks: mean, standard deviation."""
        scores = [m.normalized for m in self.of(kind, method, count)]
        return statistics.fmean(scores), statistics.pstdev(scores)


class LoRALinear(nn.Module):
    """Plain LoRA at a linearized layer's point, with its parameters: y = x Wᵀ + b + s x (A0 + dA)ᵀ (B0 + dB)ᵀ."""

    def __init__(self, layer: LinearizedLoRALinear):
        super().__init__()
        self.weight, self.bias, self.scaling = layer.weight, layer.bias, layer.scaling
        self.register_buffer("A0", layer.A0)
        self.register_buffer("B0", torch.zeros_like(layer.delta_B) if layer.B0 is None else layer.B0)
        self.delta_A = nn.Parameter(torch.zeros_like(self.A0))
        self.delta_B = nn.Parameter(torch.zeros_like(self.B0))

    def forward(self, x: Tensor) -> Tensor:
        low_rank = linear(linear(x, self.A0 + self.delta_A), self.B0 + self.delta_B)
        return linear(x, self.weight, self.bias) + self.scaling * low_rank


def with_adapters(base: DigitsMLP, kind: Kind, seed: int) -> DigitsMLP:
    """The base with adapters at the point that all tasks share."""
    model = linearize(base, TARGETS, r=RANK, alpha=ALPHA, init=kind.init, seed=seed)
    if not kind.linearized:
        for layer in model.layers:
            for name in TARGETS:
                setattr(layer, name, LoRALinear(getattr(layer, name)))
    return model


def steps_of(model: nn.Module) -> dict[str, Tensor]:
    """The task vector: phi - phi0."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def put_steps(model: nn.Module, steps: Mapping[str, Tensor], scaling: float = 1.0) -> None:
    for name, parameter in model.named_parameters():
        if name in steps:
            parameter.copy_(scaling * steps[name])


def compare(
    base: Path, out: Path, digits: Digits, regime: Regime, scalings: Sequence[float], seed: int,
    advance: Callable[[], None],
) -> AdapterResult:  # fmt: skip
    """Fine-tunes, merges and scores all kinds. Linearized adapters are saved below `out`, for PEFT and for merging."""
    own, merged = {}, []
    for kind in KINDS:
        model = with_adapters(load_checkpoint(base), kind, seed)
        vectors, own[kind.name] = {}, {}
        for task in TASKS:
            tuned = trained(
                model, digits.train.seen_as(task), epochs=regime.task_epochs, seed=seed,
                learning_rate=regime.adapter_learning_rate, weight_decay=0.0, advance=advance,
            )  # fmt: skip
            vectors[task], own[kind.name][task] = steps_of(tuned), accuracy(tuned, digits.test.seen_as(task))
            if kind.linearized:
                save_adapter(tuned, out / ("B0_nonzero" if kind.init == "gaussian" else "B0_zero") / task)
        merged += merges(kind, model, vectors, own[kind.name], digits, scalings, advance)
    start = load_checkpoint(base)
    return AdapterResult(own, {task: accuracy(start, digits.test.seen_as(task)) for task in TASKS}, tuple(merged))


def merges(
    kind: Kind, model: nn.Module, vectors: Mapping[str, Mapping[str, Tensor]], own: Mapping[str, float],
    digits: Digits, scalings: Sequence[float], advance: Callable[[], None],
) -> list[Merged]:  # fmt: skip
    """Every subset of two or more tasks, by every method."""
    subsets = [chosen for count in range(2, len(TASKS) + 1) for chosen in combinations(TASKS, count)]
    found = []
    for chosen in subsets:
        for method in METHODS:
            steps = merged_steps([vectors[task] for task in chosen], method)
            scaling = best_scaling(model, steps, digits.validation, scalings)
            put_steps(model, steps, scaling)
            test = {task: accuracy(model, digits.test.seen_as(task)) for task in TASKS}
            normalized = statistics.fmean(test[task] / own[task] for task in TASKS)
            found.append(Merged(kind.name, method, chosen, scaling, normalized, statistics.fmean(test.values())))
            advance()
    return found


def merged_steps(vectors: Sequence[Mapping[str, Tensor]], method: str) -> dict[str, Tensor]:
    """The merge of task vectors with lambda = 1: their base is a step of zero."""
    zero = {name: torch.zeros_like(step) for name, step in vectors[0].items()}
    return merge_state_dicts(zero, [dict(v) for v in vectors], method=method, weight=1.0, **METHODS[method])


def best_scaling(model: nn.Module, steps: Mapping[str, Tensor], images: Images, scalings: Sequence[float]) -> float:
    """The lambda with the best mean accuracy over all tasks on these images; the smallest of equals."""

    def score(scaling: float) -> float:
        put_steps(model, steps, scaling)
        return statistics.fmean(accuracy(model, images.seen_as(task)) for task in TASKS)

    return max(scalings, key=score)


def adapter_steps(images: Images, regime: Regime, batch: int) -> int:
    """Calls of advance() in `compare`."""
    training = len(TASKS) * regime.task_epochs * -(-len(images) // batch)
    subsets = 2 ** len(TASKS) - len(TASKS) - 1
    return len(KINDS) * (training + subsets * len(METHODS))
