"""A task as fitting sees it: batches, what the model answers to them, and the loss of the answer.

entropy        mean over the rows of -sum p log p, p = softmax(logits); needs no labels
cross_entropy  mean over the rows of -log p[label]
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree

from peta_fast.errors import CompatibilityError, RecipeError

LABELS = ("labels", "label", "label_ids")
LOSSES = ("entropy", "cross_entropy")


@dataclass(frozen=True)
class Task:
    """One of the tasks that the merged model shall serve.

    name     said in errors and histories
    batches  a DataLoader or another iterable that can be gone through again and again, or a function that returns one.
             A batch is a tensor, (inputs, labels, ...) or a mapping of the model's arguments; labels are not looked at
             unless the loss needs them
    forward  (model, batch) -> logits [*, classes]; by default the model is called with the tensor, with the first
             member, or with the mapping without its labels, and its answer's `logits` are taken where it has some
    """

    name: str
    batches: Iterable[Any] | Callable[[], Iterable[Any]]
    forward: Callable[[nn.Module, Any], Tensor] | None = None


def endless(task: Task) -> Iterator[Any]:
    """The task's batches, from the start again when they end. Raises CompatibilityError when there is none."""
    while True:
        empty = True
        for batch in task.batches() if callable(task.batches) else task.batches:
            empty = False
            yield batch
        if empty:
            raise CompatibilityError(
                f"task {task.name!r}",
                "its batches have come to an end, and do not start again",
                "Give a DataLoader, a list, or a function that returns a new iterator; a generator serves once.",
            )


def logits_of(task: Task, model: nn.Module, batch: Any) -> Tensor:
    """[*, classes], as the task's forward or the model's default call gives them."""
    logits = called(model, batch) if task.forward is None else task.forward(model, batch)
    if not isinstance(logits, Tensor) or logits.dim() < 2 or not logits.is_floating_point():
        got = f"{logits.dtype} {list(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise CompatibilityError(
            f"task {task.name!r}",
            f"expected logits [rows, classes], got {got}",
            "Give forward: (model, batch) -> them.",
        )
    return logits


def called(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        answer = model(**{key: value for key, value in batch.items() if key not in LABELS})
    else:
        answer = model(batch[0] if isinstance(batch, (tuple, list)) else batch)
    if isinstance(answer, Mapping) and "logits" in answer:
        return answer["logits"]
    answer = getattr(answer, "logits", answer)
    return answer[0] if isinstance(answer, tuple) else answer


def entropy(logits: Tensor) -> Tensor:
    """[*, classes] -> mean over the rows, in nats, 0-dimensional; in fp32 at least."""
    log_p = functional.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
    return -(log_p.exp() * log_p).sum(-1).mean()


def loss_of(kind: str, task: Task, logits: Tensor, batch: Any) -> Tensor:
    """The loss of one batch, 0-dimensional. Raises CompatibilityError where it needs labels and there are none."""
    if kind == "entropy":
        return entropy(logits)
    labels = labels_of(task, batch)
    classes = logits.shape[-1]
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return functional.cross_entropy(wide.reshape(-1, classes), labels.to(logits.device).reshape(-1))


def labels_of(task: Task, batch: Any) -> Tensor:
    if isinstance(batch, Mapping):
        found = next((batch[key] for key in LABELS if batch.get(key) is not None), None)
        got = f"a mapping of {', '.join(map(str, batch))}"
    else:
        found = batch[1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None
        got = f"{type(batch).__name__} {list(batch.shape)}" if isinstance(batch, Tensor) else type(batch).__name__
    if not isinstance(found, Tensor) or found.is_floating_point():
        raise CompatibilityError(
            f"task {task.name!r}",
            f"loss 'cross_entropy' needs labels, got batches without: {got}",
            "Give (inputs, labels) or a mapping with 'labels'; loss='entropy' needs none.",
        )
    return found


def check_loss(kind: str) -> None:
    if kind not in LOSSES:
        raise RecipeError("loss", f"expected one of {', '.join(LOSSES)}, got {kind!r}")


def moved(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on the device."""
    return _pytree.tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, batch)
