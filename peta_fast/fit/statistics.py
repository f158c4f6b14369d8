"""Statistics of one task's model on its own data, from which merges are solved: Gram matrices and the Fisher.

    <module>.input_gram    mean of x x^T      rows x that go into a layer, packed upper triangle
    <module>.output_gram   mean of g g^T      gradients g of the layer's output: with the input's, K-FAC
    <tensor>.fisher        mean of (dL/dw)^2  over examples, each example's gradient by itself
    <tensor>.fisher_gram   mean of its outer product with itself, for small tensors such as IA3's

L is one example's mean of -log p(label). Rows of padding do not count. Sums are fp32.

Cost: a forward pass, and where gradients are wanted a backward pass without gradients of weights; in^2 + out^2 flops a
row and 4 (in^2 + out^2) bytes a layer. The Fisher of models made of nn.Linear, LayerNorm and embeddings costs about one
more pass; of others, a pass for each example by itself.

Source: Tam et al., arXiv:2312.04339 (K-FAC Grams); Jin et al., arXiv:2212.09849; Matena and Raffel, arXiv:2111.09832.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peta_fast.errors import CheckpointError, CompatibilityError, RecipeError
from peta_fast.fit import _batches as batching
from peta_fast.fit import _layers as layers
from peta_fast.fit._fisher import OnePass, one_by_one
from peta_fast.fit._marks import marks
from peta_fast.fit._store import Store, read
from peta_fast.formats.weight_marks import METADATA
from peta_fast.methods import KINDS
from peta_fast.ops.gram import add_gram, pack, unpack

LABELS = ("data", "sampled")
COMPAT = ("native", "fusion_bench")
LARGEST_BLOCK = 8192
"""Elements of a tensor whose whole Fisher may be collected."""


class Statistics(dict):
    """Name -> fp32 tensor, as a statistics file holds them.

    metadata  text to text: examples, counts (JSON, rows or examples behind each entry), transposed (JSON, modules whose
              weights are stored [in, out]), fisher_norm, how they were collected, and from which weights (JSON, marks
              by tensor name: a merge refuses statistics of another model)
    """

    def __init__(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]):
        super().__init__(tensors)
        self.metadata = dict(metadata)

    @property
    def examples(self) -> int:
        return int(self.metadata["examples"])

    @property
    def counts(self) -> dict[str, int]:
        return json.loads(self.metadata["counts"])


def load_statistics(path: str | Path) -> Statistics:
    """A file that collect_statistics has written. Raises CheckpointError."""
    return Statistics(*read(Path(path)))


def collect_statistics(
    model: nn.Module,
    batches: Iterable[Any],
    out: str | Path | None = None,
    *,
    kinds: Iterable[str] = ("input_gram",),
    only: Callable[[str], bool] | None = None,
    labels: str = "data",
    examples: int | None = None,
    seed: int = 0,
    compat: str = "native",
    logits: Callable[[nn.Module, Any], Tensor] | None = None,
    targets: Callable[[Any], Tensor | None] | None = None,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    mask: Callable[[str, Any], Tensor | None] | None = None,
    save_every: int = 50,
    force: bool = False,
    progress: Callable[[int, int | None], None] | None = None,
) -> Statistics:
    """Collects statistics of a model on its task's data, and writes them to `out` if given.

    model      any torch model; run in eval mode, put back as it was
    batches    a dataloader: mappings (Hugging Face), (inputs, labels), or inputs alone
    out        a safetensors file, there when it is whole. A killed run goes on from the last `save_every` batches when
               it is called again with the same model and data in the same order; a finished one is read
    kinds      of "input_gram", "output_gram", "fisher", "fisher_gram"
    only       name of a module (Grams) or tensor (Fisher) -> whether it is wanted; "fisher_gram" needs it
    labels     "data" (the empirical Fisher), or "sampled" from the model's own prediction (the true one)
    examples   at most
    compat     "fusion_bench": one gradient a batch, of the sum over examples and classes of sqrt(p) log p, in place of
               each example's own
    logits     (model, batch) -> [N, C] or [N, L, C]; the output's `logits`, or the output, when not given
    targets    batch -> labels [N] or [N, L], -100 where none counts; "labels", or the last of a tuple
    loss       (model, batch) -> [N] in place of the cross-entropy of those two
    mask       (module, batch) -> [N, L], zero where a row is padding; "attention_mask" and, in decoders, the labels
    progress   called with the batches done and, where it is known, their number

    Raises RecipeError for arguments, CompatibilityError for batches that do not fit, such as lacking labels,
    CheckpointError for losses or activations that are not finite, ResourceError for files. Nothing is written then.
    """
    kinds = tuple(kinds)
    _check_arguments(kinds, labels, compat, only, loss, examples)
    given = {"logits": logits, "labels": targets, "loss": loss}
    losses = batching.Losses(labels, seed, **{name: f for name, f in given.items() if f is not None})
    settings = [kinds, labels, seed, compat, examples]
    alone = only if {"input_gram", "output_gram"}.isdisjoint(kinds) else None  # Grams need the way to every output
    with layers.evaluating(model, gradients=kinds != ("input_gram",), only=alone):
        collector = _Collector(model, kinds, only, losses, mask, compat)
        store = Store(Path(out), _mark(model, settings, collector.sums)) if out is not None else None
        done = store.finished(force) if store else None
        if done is not None:
            return Statistics(*done)
        _run(collector, store, batches, examples, save_every, progress)
    tensors = collector.means()
    metadata = collector.metadata(labels)
    if store:
        store.finish(tensors, metadata)
    return Statistics(tensors, metadata)


def _check_arguments(kinds, labels, compat, only, loss, examples) -> None:
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise RecipeError("kinds", f"expected some of {', '.join(KINDS)}, got {', '.join(unknown) or 'none'}")
    if labels not in LABELS:
        raise RecipeError("labels", f"expected one of {', '.join(LABELS)}, got {labels!r}")
    if compat not in COMPAT:
        raise RecipeError("compat", f"expected one of {', '.join(COMPAT)}, got {compat!r}")
    if "fisher_gram" in kinds and only is None:
        raise RecipeError(
            "only", "expected a choice of tensors for 'fisher_gram', got none", "only=lambda n: 'ia3' in n"
        )
    if labels == "sampled" and loss is not None:
        raise RecipeError("loss", "a loss of your own has labels of its own; expected labels='data' with it")
    if compat == "fusion_bench" and (kinds != ("fisher",) or loss is not None or labels != "data"):
        raise RecipeError("compat", "fusion_bench is a way to estimate 'fisher' alone, from the logits alone")
    if examples is not None and examples < 1:
        raise RecipeError("examples", f"expected at least 1, got {examples}")


def _run(collector: _Collector, store: Store | None, batches, examples, save_every: int, progress) -> None:
    total = len(batches) if hasattr(batches, "__len__") and examples is None else None
    begun = store.begun() if store else None
    resumed = collector.restore(*begun) if begun else 0
    digest = hashlib.blake2b(digest_size=16)
    number = 0
    for number, batch in enumerate(batching.limited(batches, examples), 1):
        batching.add_digest(digest, batch)
        if number > resumed:
            collector.add(batch)
        elif number == resumed and digest.hexdigest() != begun[1]["data"]:
            raise CompatibilityError(
                str(store.unfinished), "was begun with other data, or the same in another order",
                "Use a loader that does not shuffle, or remove that file to start anew.",
            )  # fmt: skip
        if store and number > resumed and number % save_every == 0:
            collector.require_finite()
            store.keep(collector.packed(), {**collector.state(), "batches": number, "data": digest.hexdigest()})
        if progress:
            progress(number, total)
    if number < max(resumed, 1):
        raise CompatibilityError("batches", f"expected at least {max(resumed, 1)}, got {number}")
    collector.require_finite()


@dataclass
class _Collector:
    """Sums over the examples seen so far.

    sums    name -> fp32, [n, n] for Grams
    counts  name -> rows or examples in it
    """

    model: nn.Module
    kinds: tuple[str, ...]
    only: Callable[[str], bool] | None
    losses: batching.Losses
    mask: Callable[[str, Any], Tensor | None] | None
    compat: str
    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    examples: int = 0

    def __post_init__(self):
        wants_grams = {"input_gram", "output_gram"} & set(self.kinds)
        wants_fisher = {"fisher", "fisher_gram"} & set(self.kinds)
        self.modules = layers.layers_of(self.model, self.only) if wants_grams else {}
        self.parameters = {
            n: p for n, p in self.model.named_parameters()
            if wants_fisher and p.is_floating_point() and (self.only is None or self.only(n))
        }  # fmt: skip
        if not self.modules and not self.parameters:
            raise CompatibilityError(type(self.model).__name__, f"has nothing to collect {', '.join(self.kinds)} of")
        self.device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        self._refuse_large_blocks()
        for key, shape in self._shapes():
            self.sums[key] = torch.zeros(shape, device=self.device)
            self.counts[key] = 0
        self.one_pass = OnePass(self.model, self.parameters)

    def _refuse_large_blocks(self) -> None:
        large = [n for n, p in self.parameters.items() if p.numel() > LARGEST_BLOCK and "fisher_gram" in self.kinds]
        if large:
            raise RecipeError(
                "only", f"{large[0]!r} has {self.parameters[large[0]].numel():,} elements, expected at most "
                f"{LARGEST_BLOCK:,} for a whole Fisher",
            )  # fmt: skip

    def _shapes(self):
        for name, module in self.modules.items():
            inputs, outputs = layers.sides(module)
            if "input_gram" in self.kinds:
                yield f"{name}.input_gram", (inputs, inputs)
            if "output_gram" in self.kinds:
                yield f"{name}.output_gram", (outputs, outputs)
        for name, parameter in self.parameters.items():
            if "fisher" in self.kinds:
                yield f"{name}.fisher", tuple(parameter.shape)
            if "fisher_gram" in self.kinds:
                yield f"{name}.fisher_gram", (parameter.numel(), parameter.numel())

    def add(self, batch: Any) -> None:
        size = batching.size_of(batch)
        batch = batching.moved(batch, self.device)
        if self.modules:
            self._add_grams(batch)
        if self.parameters:
            with torch.enable_grad():
                self._add_fisher(batch)
        self.examples += size

    def _add_grams(self, batch: Any) -> None:
        wants_gradients = "output_gram" in self.kinds
        outputs: list | None = [] if wants_gradients else None
        with torch.set_grad_enabled(wants_gradients):
            with layers.watching(self.modules, lambda *seen: self._add_input(*seen, batch), outputs):
                if wants_gradients:
                    found = self.losses(self.model, batch, self.examples)
                elif self.losses.logits is batching.default_logits:  # a model without a head will do
                    batching.outputs_of(self.model, batch)
                else:
                    self.losses.logits(self.model, batch)
        if wants_gradients:
            names, edges = [name for name, _ in outputs], [edge for _, edge in outputs]
            for name, gradient in zip(names, layers.gradients_of(found, edges), strict=True):
                if gradient is not None:
                    rows = layers.output_rows(self.modules[name], gradient)
                    self._add_rows(f"{name}.output_gram", rows, name, batch)

    def _add_input(self, name: str, module: nn.Module, x: Tensor, batch: Any) -> None:
        if "input_gram" in self.kinds:
            self._add_rows(f"{name}.input_gram", layers.input_rows(module, x.detach()), name, batch)

    def _add_rows(self, key: str, rows: Tensor, name: str, batch: Any) -> None:
        mask = self.mask(name, batch) if self.mask else batching.padding_mask(self.model, name, batch)
        rows = unpadded(rows, mask, name, batching.size_of(batch))
        add_gram(self.sums[key], rows)
        self.counts[key] += len(rows)

    def _add_fisher(self, batch: Any) -> None:
        if self.compat == "fusion_bench":
            gradients = [self._gradient_of_the_batch(batch)]
        elif "fisher_gram" not in self.kinds and self.one_pass.add(self._fishers(), batch, self.losses, self.examples):
            gradients = []
        else:
            gradients = one_by_one(self.model, batch, self.losses, self.examples, self.parameters)
        for gradient in gradients:
            for name, g in gradient.items():
                if "fisher" in self.kinds:
                    self.sums[f"{name}.fisher"].addcmul_(g, g)
                if "fisher_gram" in self.kinds:
                    add_gram(self.sums[f"{name}.fisher_gram"], g.reshape(1, -1))
        for key in self.sums:
            if key.endswith((".fisher", ".fisher_gram")):
                self.counts[key] += batching.size_of(batch)

    def _fishers(self) -> dict[str, Tensor]:
        return {name: self.sums[f"{name}.fisher"] for name in self.parameters}

    def _gradient_of_the_batch(self, batch: Any) -> dict[str, Tensor]:
        scores, _ = self.losses.scores(self.model, batch)
        logs = scores.float().log_softmax(-1)
        total = (logs.detach().exp().sqrt() * logs).sum()
        if not total.isfinite():
            raise CheckpointError(f"examples from {self.examples} on", f"expected a finite loss, got {total.item()}")
        found = torch.autograd.grad(total, list(self.parameters.values()), allow_unused=True)
        return {n: g.float() for n, g in zip(self.parameters, found, strict=True) if g is not None}

    def require_finite(self) -> None:
        """Raises CheckpointError for NaN and inf among the sums."""
        for key, total in self.sums.items():
            if not _upper(key, total).isfinite().all():
                raise CheckpointError(
                    key, "expected finite values in fp32, got NaN or inf in what went through the model"
                )

    def packed(self) -> dict[str, Tensor]:
        """The sums as files hold them."""
        return {key: _upper(key, total).cpu() for key, total in self.sums.items()}

    def state(self) -> dict:
        return {"counts": self.counts, "examples": self.examples}

    def restore(self, tensors: dict[str, Tensor], state: dict) -> int:
        """Goes on from what a killed run had; returns how many batches are in it."""
        for key, total in self.sums.items():
            total.copy_(unpack(tensors[key]) if key.endswith("_gram") else tensors[key])
        self.counts, self.examples = state["counts"], state["examples"]
        return state["batches"]

    def means(self) -> dict[str, Tensor]:
        """What was seen at all; a layer that never ran has no statistics."""
        return {k: total / self.counts[k] for k, total in self.packed().items() if self.counts[k]}

    def metadata(self, labels: str) -> dict[str, str]:
        squares = (t.square().sum(dtype=torch.float64).item() for k, t in self.means().items() if k.endswith(".fisher"))
        return {
            "format_version": "1",
            "kinds": ",".join(self.kinds),
            "labels": labels,
            "compat": self.compat,
            "examples": str(self.examples),
            "counts": json.dumps(self.counts),
            "transposed": json.dumps([n for n, m in self.modules.items() if layers.is_transposed(m)]),
            "fisher_norm": repr(math.sqrt(sum(squares))),
            METADATA: marks(self.model.state_dict(), self.means()),
        }


def _upper(key: str, total: Tensor) -> Tensor:
    return pack(total) if key.endswith("_gram") else total


def unpadded(rows: Tensor, mask: Tensor | None, name: str, size: int) -> Tensor:
    """rows [*, n] -> [m, n], those of padding left out; [N, n], one row an example, has none.

    Raises CompatibilityError when the mask does not fit.
    """
    flat = rows.reshape(-1, rows.shape[-1])
    if mask is None or rows.dim() == 2 and len(rows) == size:
        return flat
    if mask.numel() != len(flat):
        raise CompatibilityError(
            name, f"expected a mask for rows of {list(rows.shape[:-1])}, got one of {list(mask.shape)}",
            "Pass mask=(module, batch) -> [N, L], or None where nothing is padding.",
        )  # fmt: skip
    return flat[mask.reshape(-1).to(rows.device) != 0]


def _mark(model: nn.Module, settings, sums: Mapping[str, Tensor]) -> str:
    """Of the model's weights and all that is asked of it."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps([settings, sorted(sums)]).encode())
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor):
            digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(batching.bytes_of(tensor))
    return digest.hexdigest()
