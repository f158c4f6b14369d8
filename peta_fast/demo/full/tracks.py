"""What a track is made of: a base, tasks with their splits, and the answer of a model to a task's batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from peta_fast.demo.data import TASKS as DOMAINS
from peta_fast.demo.data import Images, load_digits, mix
from peta_fast.demo.full.settings import DIGITS, TEXT, TrackSettings
from peta_fast.demo.full.vision import DigitsTransformer

Batch = Mapping[str, Tensor]
"""The model's arguments by name, and "labels"."""
WINDOW = 8
"""Batches among which sentences are sorted by their length."""


@dataclass(frozen=True)
class Track:
    """A track, ready to be used.

    base       the model that all fine-tunes start from
    examples   task -> split -> batches of one example each column, as one mapping of tensors [N, ...]
    heads      task -> [labels, features], where the model gives features; none where it gives logits itself
    """

    name: str
    settings: TrackSettings
    tasks: tuple[str, ...]
    base: nn.Module
    examples: Mapping[str, Mapping[str, Batch]]
    heads: Mapping[str, Tensor] = field(default_factory=dict)

    def logits(self, task: str) -> Callable[[nn.Module, Batch], Tensor]:
        """(model, batch) -> [N, labels]"""
        head = self.heads.get(task)

        def answer(model: nn.Module, batch: Batch) -> Tensor:
            found = model(**{name: tensor for name, tensor in batch.items() if name != "labels"})
            return found if head is None else found @ head.T

        return answer

    def batches(self, task: str, split: str, size: int, *, most: int | None = None, order=None) -> list[Batch]:
        """Batches of a split in its own order, or in the given one."""
        whole = self.examples[task][split]
        index = torch.arange(len(whole["labels"]))[:most] if order is None else order
        return [cut({n: t[part] for n, t in whole.items()}) for part in index.split(size)]

    def count(self, task: str, split: str) -> int:
        return len(self.examples[task][split]["labels"])

    @torch.no_grad()
    def accuracy(self, model: nn.Module, task: str, split: str) -> float:
        """Fraction of right answers, in [0, 1]."""
        model.eval()
        answer, right = self.logits(task), 0
        for batch in self.batches(task, split, self.settings.score_batch):
            right += int((answer(model, batch).argmax(-1) == batch["labels"]).sum())
        return right / self.count(task, split)

    @torch.no_grad()
    def accuracies_along(
        self, model: nn.Module, task: str, split: str, scalings: Sequence[float]
    ) -> dict[float, float]:
        """Of a tangent model with its step multiplied by each of the scalings: one forward pass for all of them."""
        model.eval()
        right, head = dict.fromkeys(scalings, 0), self.heads.get(task)
        for batch in self.batches(task, split, self.settings.score_batch):
            parts = model.dual(**{name: tensor for name, tensor in batch.items() if name != "labels"})
            value, tangent = parts if head is None else (part @ head.T for part in parts)
            for scaling in scalings:
                right[scaling] += int(((value + scaling * tangent).argmax(-1) == batch["labels"]).sum())
        return {scaling: count / self.count(task, split) for scaling, count in right.items()}

    def accuracies(self, model: nn.Module, split: str, tasks: Sequence[str] | None = None) -> dict[str, float]:
        return {task: self.accuracy(model, task, split) for task in tasks or self.tasks}


def cut(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the columns that are padding in every row."""
    if "attention_mask" not in batch:
        return batch
    longest = int(batch["attention_mask"].sum(1).max())
    return {name: t[:, :longest].contiguous() if t.dim() > 1 else t for name, t in batch.items()}


def train(
    model: nn.Module, track: Track, task: str, *, epochs: int, learning_rate: float, seed: int,
    weight_decay: float = 0.0,
) -> None:  # fmt: skip
    """Trains what requires a gradient, in place: AdamW, a tenth of warm-up, then a cosine, cross-entropy."""
    chosen = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(chosen, lr=learning_rate, weight_decay=weight_decay)
    size, answer = track.settings.batch, track.logits(task)
    total = epochs * -(-track.count(task, "train") // size)
    warm = max(1, total // 10)
    rise = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warm, 1.0, warm)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, total - warm))
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [rise, fall], [warm])
    generator = torch.Generator().manual_seed(seed)
    model.eval()  # no dropout: fine-tunes differ by their tasks alone
    for _ in range(epochs):
        order = shuffled(track.examples[task]["train"], size, generator)
        for batch in track.batches(task, "train", size, order=order):
            loss = functional.cross_entropy(answer(model, batch), batch["labels"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def shuffled(examples: Batch, size: int, generator: torch.Generator) -> Tensor:
    """A random order; of sentences, batches of similar length in a random order."""
    order = torch.randperm(len(examples["labels"]), generator=generator)
    if "attention_mask" not in examples:
        return order
    lengths = examples["attention_mask"].sum(1)
    near = [part[lengths[part].argsort(stable=True)] for part in order.split(WINDOW * size)]
    batches = torch.cat(near).split(size)
    return torch.cat([batches[i] for i in torch.randperm(len(batches), generator=generator)])


def track_of(name: str, settings: TrackSettings, seed: int, base: Mapping[str, Tensor] | None = None) -> Track:
    """The track with splits and head of this seed. base: weights of the digits' base; untrained when not given."""
    if name == TEXT:
        from peta_fast.demo.full.text import text_track

        return text_track(settings, seed)
    assert name == DIGITS
    return digits_track(settings, seed, base)


def digits_track(settings: TrackSettings, seed: int, base: Mapping[str, Tensor] | None) -> Track:
    """Digits in four domains; the model's own ten logits."""
    digits = load_digits(seed)
    most = {"train": settings.train, "validation": settings.validation, "test": settings.test}
    parts = {name: getattr(digits, name) for name in most}
    chosen = {name: part.pick(torch.arange(min(most[name], len(part)))) for name, part in parts.items()}
    examples = {task: {n: as_batch(part.seen_as(task)) for n, part in chosen.items()} for task in DOMAINS}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DigitsTransformer()
    if base is not None:
        model.load_state_dict(base)
    return Track(DIGITS, settings, tuple(DOMAINS), model.eval(), examples)


def as_batch(images: Images) -> Batch:
    return {"pixels": images.pixels, "labels": images.labels}


def trained_base(track: Track, seed: int) -> dict[str, Tensor]:
    """The digits' base: upright digits, and a few labelled images of each task's domain."""
    settings, images = track.settings, load_digits(seed).train
    images = images.pick(torch.arange(min(settings.train, len(images))))
    few = images.few_per_digit(settings.few_per_digit)
    seen = as_batch(mix([images, *(few.seen_as(task) for task in track.tasks)]))
    model = copy.deepcopy(track.base)
    whole = Track(DIGITS, settings, ("base",), model, {"base": {"train": seen}})
    train(
        model, whole, "base", epochs=settings.base_epochs, learning_rate=settings.base_rate, seed=seed,
        weight_decay=0.01,
    )  # fmt: skip
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
