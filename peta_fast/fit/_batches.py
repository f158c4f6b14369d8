"""Batches as they come out of any dataloader: how they go into a model, what their labels and losses are.

A batch is a mapping of tensors by name, as Hugging Face's collators make them; a tuple or list of inputs, the labels
last; or one tensor of inputs, without labels. The first dimension counts examples.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from peta_fast.errors import CheckpointError, CompatibilityError

IGNORED = -100
"""The label of a position that does not count."""
LABELS = "labels"
CROSS_ATTENTION = re.compile(
    r"(EncDecAttention|encoder_attn|crossattention|cross_attn)\..*?\b(k|v|k_proj|v_proj|key|value)$"
)
"""Modules of a decoder that see the encoder's positions."""


def tensors_of(batch: Any) -> list[Tensor]:
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else [batch]
    return [value for value in values if isinstance(value, Tensor)]


def size_of(batch: Any) -> int:
    """Examples of a batch. Raises CompatibilityError when it is none."""
    sizes = {len(t) for t in tensors_of(batch) if t.dim()}
    if len(sizes) != 1:
        got = f"first dimensions {sorted(sizes)}" if sizes else f"a {type(batch).__name__} without tensors"
        raise CompatibilityError("batches", f"expected tensors with one example in each row, got {got}")
    return sizes.pop()


def part_of(batch: Any, start: int, stop: int) -> Any:
    """Examples [start, stop)."""

    def cut(value: Any) -> Any:
        return value[start:stop] if isinstance(value, Tensor) and value.dim() else value

    if isinstance(batch, Mapping):
        return {name: cut(value) for name, value in batch.items()}
    return type(batch)(map(cut, batch)) if isinstance(batch, (tuple, list)) else cut(batch)


def moved(batch: Any, device: torch.device) -> Any:
    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    if isinstance(batch, Mapping):
        return {name: move(value) for name, value in batch.items()}
    return type(batch)(map(move, batch)) if isinstance(batch, (tuple, list)) else move(batch)


def limited(batches: Iterable, examples: int | None) -> Iterator[Any]:
    """The batches of the first `examples` examples, the last one cut."""
    left = examples
    for batch in batches:
        if left is not None:
            if left <= 0:
                return
            size = size_of(batch)
            batch = part_of(batch, 0, left) if size > left else batch
            left -= min(size, left)
        yield batch


def add_digest(digest: hashlib.blake2b, batch: Any) -> None:
    for tensor in tensors_of(batch):
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(bytes_of(tensor))


def bytes_of(tensor: Tensor) -> memoryview:
    """The elements as they lie in memory, in row-major order."""
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def inputs_of(batch: Any) -> tuple[tuple, dict]:
    """Positional and named inputs of the model; labels left out."""
    if isinstance(batch, Mapping):
        return (), {name: value for name, value in batch.items() if name != LABELS}
    if isinstance(batch, (tuple, list)):
        return tuple(batch[:-1] if len(batch) > 1 else batch), {}
    return (batch,), {}


def outputs_of(model: nn.Module, batch: Any) -> Any:
    """What the model returns. An encoder-decoder is given its labels, from which it makes the decoder's inputs."""
    positional, named = inputs_of(batch)
    if is_encoder_decoder(model) and "decoder_input_ids" not in named and LABELS in batch:
        named[LABELS] = batch[LABELS]
    return model(*positional, **named)


def default_logits(model: nn.Module, batch: Any) -> Tensor:
    """[N, C] or [N, L, C]"""
    found = outputs_of(model, batch)
    logits = getattr(found, "logits", found)
    if not isinstance(logits, Tensor):
        raise CompatibilityError(
            type(model).__name__,
            f"expected logits, got {type(found).__name__}",
            "Pass logits=(model, batch) -> [N, C] (--logits).",
        )
    return logits


def default_labels(batch: Any) -> Tensor | None:
    """[N] or [N, L]; None where the batch has none."""
    if isinstance(batch, Mapping):
        return batch.get(LABELS)
    return batch[-1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None


def is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def is_causal(model: nn.Module) -> bool:
    """Whether logits of a position speak of the next one, by the names of transformers."""
    name = type(model).__name__
    return ("CausalLM" in name or "LMHead" in name) and not is_encoder_decoder(model)


def padding_mask(model: nn.Module, name: str, batch: Any) -> Tensor | None:
    """[N, L], nonzero where a position of the module's input is no padding; None where the batch has no mask."""
    if not isinstance(batch, Mapping):
        return None
    mask = batch.get("attention_mask")
    if is_encoder_decoder(model) and "encoder" not in name.split(".") and not CROSS_ATTENTION.search(name):
        labels = batch.get(LABELS)
        mask = batch.get("decoder_attention_mask", labels != IGNORED if labels is not None else None)
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


@dataclass(frozen=True)
class Losses:
    """How a batch becomes one loss an example: the mean over its labels of -log p(label).

    source  "data": labels of the batch; "sampled": drawn from the model's own prediction
    loss    (model, batch) -> [N], in place of all this
    """

    source: str
    seed: int
    logits: Callable[[nn.Module, Any], Tensor] = default_logits
    labels: Callable[[Any], Tensor | None] = default_labels
    loss: Callable[[nn.Module, Any], Tensor] | None = None

    def __call__(self, model: nn.Module, batch: Any, first: int) -> Tensor:
        """[N]. first: number of the batch's first example, which sampled labels depend on.

        Raises CompatibilityError for labels that are missing or do not fit, CheckpointError for NaN and inf.
        """
        losses = self.loss(model, batch) if self.loss else self._nll(model, batch, first)
        if losses.shape != (size_of(batch),):
            raise CompatibilityError(
                "loss", f"expected one value an example, [{size_of(batch)}], got {list(losses.shape)}",
                "Leave out the reduction.",
            )  # fmt: skip
        wrong = (~losses.detach().isfinite()).nonzero().flatten()
        if len(wrong):
            at = int(wrong[0])
            raise CheckpointError(f"example {first + at}", f"expected a finite loss, got {losses[at].item()}")
        return losses

    def _nll(self, model: nn.Module, batch: Any, first: int) -> Tensor:
        scores, targets = self.scores(model, batch)
        if self.source == "sampled":
            targets = self._sampled(scores, targets, first)
        elif targets is None:
            raise CompatibilityError(
                "batches", "expected labels, found none: output Grams and the Fisher are made of gradients of a loss",
                "Add them (key 'labels', or last in the tuple), or take labels='sampled' (--labels sampled), "
                "or pass loss=.",
            )  # fmt: skip
        else:
            check_labels(scores, targets)
        each = functional.cross_entropy(
            scores.flatten(0, -2).float(), targets.flatten(), ignore_index=IGNORED, reduction="none"
        ).view(targets.shape)
        if targets.dim() == 1:
            return each
        counted = (targets != IGNORED).flatten(1)
        return each.flatten(1).sum(1) / counted.sum(1).clamp_min(1)

    def scores(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor | None]:
        """Logits, and the labels that they are about."""
        scores, targets = self.logits(model, batch), self.labels(batch)
        if scores.dim() == 3 and is_causal(model) and self.logits is default_logits:
            scores, targets = scores[:, :-1], None if targets is None else targets[:, 1:]
        return scores, targets

    def _sampled(self, scores: Tensor, targets: Tensor | None, first: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + first)
        chances = scores.detach().float().softmax(-1).flatten(0, -2).cpu()
        if not chances.isfinite().all():
            raise CheckpointError(f"examples from {first} on", "expected finite logits, got NaN or inf")
        drawn = torch.multinomial(chances, 1, generator=generator).view(scores.shape[:-1]).to(scores.device)
        return drawn if targets is None else drawn.where(targets != IGNORED, targets)


def check_labels(scores: Tensor, targets: Tensor) -> None:
    """Raises CompatibilityError when the labels are not those of the logits."""
    if targets.dtype.is_floating_point or targets.dtype == torch.bool:
        raise CompatibilityError(
            "labels", f"expected integers, got {str(targets.dtype).removeprefix('torch.')}",
            "For another task than classification, pass loss=(model, batch) -> [N].",
        )  # fmt: skip
    if targets.shape != scores.shape[:-1]:
        raise CompatibilityError(
            "labels",
            f"expected {list(scores.shape[:-1])} for logits of {list(scores.shape)}, got {list(targets.shape)}",
        )
    counted = targets[targets != IGNORED]
    if counted.numel() and not 0 <= counted.min() <= counted.max() < scores.shape[-1]:
        raise CompatibilityError(
            "labels", f"go from {int(counted.min())} to {int(counted.max())}, the model has {scores.shape[-1]} classes"
        )
