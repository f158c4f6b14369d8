"""RegMean++: RegMean whose Gram matrices are of what the merged blocks before a layer let through.

    what stands in no block (embeddings, norms between) is averaged
    for each block in the order in which they run:
        G_t of its layers: task t's data through the merged blocks, into the block with task t's weights
        its weights merged from these G_t, its other tensors averaged

The Grams come out as statistics, so `method: regmean_pp` makes the same merge of checkpoints in files.

Cost: where blocks are a plain stack, as the layers of a transformer are, what goes into a block is carried on from the
one before: a task's data go through the stack three times, whatever its depth. It is held in memory, for all examples
of all tasks. Elsewhere, for each block and task a forward pass that ends with the block.
Source: Nguyen et al., 2025, arXiv:2508.03121.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peta_fast._assignment import layer_of
from peta_fast.errors import CheckpointError, CompatibilityError, RecipeError
from peta_fast.fit import _batches as batching
from peta_fast.fit import _layers as layers
from peta_fast.fit._marks import marks
from peta_fast.fit._stacks import NoStack, Stack, stacks_in
from peta_fast.fit._store import Store
from peta_fast.fit.statistics import Statistics, unpadded
from peta_fast.formats.weight_marks import METADATA
from peta_fast.merging import merge_state_dicts
from peta_fast.methods.regmean_pp import collected_as
from peta_fast.ops.gram import add_gram, pack

State = dict[str, Tensor]


def regmean_pp(
    models: Sequence[nn.Module],
    batches: Sequence[Iterable[Any]],
    *,
    blocks: Sequence[str] | None = None,
    off_diagonal: float = 0.9,
    weight: Sequence[float] | None = None,
    examples: int | None = None,
    mask: Callable[[str, Any], Tensor | None] | None = None,
    out: Sequence[str | Path] | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[State, list[Statistics]]:
    """Merges models block by block.

    models        T fine-tuned models of one architecture; left as they are
    batches       T loaders, one a task, as collect_statistics takes them; labels are not needed
    blocks        names of modules in the order in which they run; when not given, the numbered members of lists
                  (`encoder.layer.3`), and layers outside them, in the order of a first pass
    off_diagonal  multiplies off-diagonal elements of the Grams
    weight        one a model, multiplies its Grams
    examples      of each task at most; they are held in memory, and what goes into a block with them
    mask          (module, batch) -> [N, L], zero where a row is padding; "attention_mask" when not given
    out           T files that take the statistics
    progress      called with the blocks done and their number

    Returns the merged state dict, and each task's statistics. Raises RecipeError for arguments, CompatibilityError for
    models and batches that do not fit, CheckpointError for activations that are not finite; nothing is written then.
    """
    for name, given in (("batches", batches), ("weight", weight), ("out", out)):
        if not models or given is not None and len(given) != len(models):
            raise RecipeError(name, f"expected one a model, got {len(given or ())} for {len(models)} models")
    stores = [Store(Path(file), "") for file in out or ()]
    for store in stores:
        store.refuse_existing(force)
    tasks = [_Task(t, model, list(batching.limited(b, examples)), mask)
             for t, (model, b) in enumerate(zip(models, batches, strict=True))]  # fmt: skip
    settings = {"off_diagonal": off_diagonal, "weight": list(weight or [1.0] * len(models))}
    merged = _merge_blocks(tasks, list(blocks or tasks[0].blocks()), settings, progress)
    found = [Statistics(task.grams, task.metadata(off_diagonal)) for task in tasks]
    for store, statistics in zip(stores, found, strict=bool(stores)):
        store.finish(statistics, statistics.metadata)
    return merged, found


def _merge_blocks(tasks: list[_Task], blocks: list[str], settings: dict, progress) -> State:
    states = [task.state() for task in tasks]
    outside = [name for name in states[0] if not any(_belongs(name, block) for block in blocks)]
    merged = _take(tasks, states, outside, {}, settings)
    done = 0
    for stack in tasks[0].stacks(blocks):
        for task in tasks:
            task.enter(stack)
        for block in stack:
            grams = [task.collect(block) for task in tasks]
            names = [name for name in states[0] if name not in merged and _belongs(name, block)]
            merged |= _take(tasks, states, names, grams, settings)
            for task in tasks:
                task.leave(block)
            done += 1
            if progress:
                progress(done, len(blocks))
    return {name: merged[name] for name in states[0]}


def _belongs(name: str, block: str) -> bool:
    return name.startswith(f"{block}.")


def _take(tasks: list[_Task], states: list[State], names: list[str], grams, settings: dict) -> State:
    """These tensors merged, and put into all tasks' models."""
    if not names:
        return {}
    parts = [{name: state[name] for name in names} for state in states]
    if any(grams):
        options = {"method": "regmean", "statistics": grams, **settings}
    else:
        options = {"method": "linear", "weight": settings["weight"]}
    merged = merge_state_dicts(None, parts, **options)
    for task in tasks:
        task.model.load_state_dict(merged, strict=False)
    return merged


class _Finished(Exception):
    """The block has run; what comes after it is not needed."""


class _Task:
    """One task's model, whose first blocks become the merged ones, and its data.

    grams   name -> packed mean, of all blocks so far
    counts  name -> rows in it
    """

    def __init__(self, number: int, model: nn.Module, batches: list, mask):
        if not batches:
            raise CompatibilityError(f"batches of model {number}", "expected at least one batch, got none")
        self.number, self.model, self.batches, self.mask = number, copy.deepcopy(model), batches, mask
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        shared = Counter(t.data_ptr() for t in self.model.state_dict(keep_vars=True).values())
        found = layers.layers_of(self.model)
        self.layers = {n: m for n, m in found.items() if shared[m.weight.data_ptr()] == 1}
        self.marks = marks(model.state_dict(), [f"{name}.input_gram" for name in self.layers])
        self.grams: State = {}
        self.counts: dict[str, int] = {}
        self.stack: Stack | None = None
        for module in self.model.modules():
            if getattr(getattr(module, "config", None), "use_cache", False):
                module.config.use_cache = False  # keys of earlier tokens, which nobody will ask for

    def state(self) -> State:
        return {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}

    def run(self, batch: Any) -> None:
        with layers.evaluating(self.model), torch.no_grad():
            batching.outputs_of(self.model, batching.moved(batch, self.device))

    def blocks(self) -> list[str]:
        """Names of blocks in the order in which their first layers run."""
        order: dict[str, None] = {}

        def see(name: str, module: nn.Module, x: Tensor) -> None:
            found = layer_of(f"{name}.")
            order.setdefault(f"{found[0]}.{found[1]}" if found else name)

        with layers.watching(self.layers, see):
            self.run(self.batches[0])
        return list(order)

    def stacks(self, blocks: Sequence[str]) -> list[list[str]]:
        """The blocks, in runs that may be stacks. Raises CompatibilityError for names that are no modules."""
        for block in blocks:
            try:
                self.model.get_submodule(block)
            except AttributeError:
                raise CompatibilityError("blocks", f"expected a module of the model, got {block!r}") from None
        return stacks_in(self.model, blocks, self.run_number)

    def enter(self, stack: Sequence[str]) -> None:
        """From here on, what goes into the stack's blocks is carried, if it can be."""
        self.stack = None
        if len(stack) > 1:
            with contextlib.suppress(NoStack):
                self.stack = Stack(self.model, stack, self.run_number, len(self.batches))

    def leave(self, block: str) -> None:
        """The block has its merged weights."""
        if self.stack is not None and block != self.stack.blocks[-1]:
            self.stack.advance()

    def run_number(self, batch: int) -> None:
        self.run(self.batches[batch])

    def collect(self, block: str) -> State:
        """The Grams of one block's layers, and their layouts. Raises CompatibilityError, CheckpointError."""
        module = self.model.get_submodule(block)
        inside = {n: m for n, m in self.layers.items() if n == block or _belongs(n, block)}
        sums: State = {}
        batch: Any = None

        def see(name: str, module: nn.Module, x: Tensor) -> None:
            mask = self.mask(name, batch) if self.mask else batching.padding_mask(self.model, name, batch)
            rows = unpadded(layers.input_rows(module, x), mask, name, batching.size_of(batch))
            key, side = f"{name}.input_gram", rows.shape[-1]
            add_gram(sums.setdefault(key, torch.zeros(side, side, device=rows.device)), rows)
            self.counts[key] = self.counts.get(key, 0) + len(rows)

        def stop(*_) -> None:
            raise _Finished

        with layers.watching(inside, see):
            handle = module.register_forward_hook(stop)
            try:
                for number in range(len(self.batches)):
                    batch = self.batches[number]
                    with contextlib.suppress(_Finished):
                        (self.stack.run if self.stack is not None else self.run_number)(number)
            finally:
                handle.remove()
        found = {key: pack(total).cpu() / self.counts[key] for key, total in sums.items() if self.counts[key]}
        wrong = [key for key, gram in found.items() if not gram.isfinite().all()]
        if wrong:
            raise CheckpointError(f"model {self.number}: {wrong[0]}", "expected finite values, got NaN or inf")
        self.grams |= found
        return Statistics(found, {"transposed": self._transposed()})

    def _transposed(self) -> str:
        return json.dumps([name for name, module in self.layers.items() if layers.is_transposed(module)])

    def metadata(self, off_diagonal: float) -> dict[str, str]:
        return {
            "format_version": "1",
            "kinds": "input_gram",
            "collected": collected_as(off_diagonal),
            "examples": str(sum(map(batching.size_of, self.batches))),
            "counts": json.dumps(self.counts),
            "transposed": self._transposed(),
            METADATA: self.marks,
        }
