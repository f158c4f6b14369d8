"""Plain stacks: blocks each of which takes what the one before gives out, as the layers of a transformer do.

What goes into a block can then be carried from block to block, so that going through all of them block by block costs
as much as going through the model. Whether blocks are such a stack is not guessed but tried on one batch, in a pass

    as it is       each block is called once, and gets tensors that the block before has given out
    block by block each gives the same bits when it is called by itself
    disturbed      with other outputs of the blocks, all that they get besides is the same: masks, positions

Where one of these does not hold - residual sums between blocks, caches, a state of its own - they are no stack.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from peta_fast.fit import _layers as layers

SHORTEST = 4
"""Blocks of a stack; for fewer, a pass through all blocks before each costs no more."""
PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)
Run = Callable[[int], None]
"""Runs the model on a batch, by its number."""


@dataclass
class Call:
    """One call of a block: what it took, as leaves of (positional, named), and what it gave out.

    links  place of a leaf it took -> place of the leaf that the block before gave out
    """

    taken: list[Any]
    form: Any
    given: list[Any]
    links: dict[int, int]

    def __call__(self, module: nn.Module) -> list[Any]:
        positional, named = _pytree.tree_unflatten(self.taken, self.form)
        return _pytree.tree_leaves(module(*positional, **named))

    def link(self, before: Call) -> None:
        places = {id(leaf): place for place, leaf in enumerate(before.given) if isinstance(leaf, Tensor)}
        self.links = {i: places[id(leaf)] for i, leaf in enumerate(self.taken) if id(leaf) in places}


class NoStack(Exception):
    """The blocks cannot be carried from one to the next."""


class _Seen(Exception):
    """The last block has run."""


def calls_of(
    model: nn.Module, blocks: Sequence[str], run: Run, batch: int, change=None, whole: bool = True
) -> dict[str, Call]:
    """What every block took and gave out in a pass; blocks that ran not once are left out.

    change  tensor -> tensor, of what the blocks give out
    whole   go on when the last of them has run
    """
    found: dict[str, list[Call]] = {name: [] for name in blocks}

    def hook(name: str) -> Callable:
        def seen(module: nn.Module, positional: tuple, named: dict, output: Any) -> Any:
            taken, form = _pytree.tree_flatten((positional, named))
            given, out_form = _pytree.tree_flatten(output)
            if change is not None:
                given = [change(x) if isinstance(x, Tensor) and x.is_floating_point() else x for x in given]
            found[name].append(Call(taken, form, given, {}))
            if not whole and name == blocks[-1]:
                raise _Seen
            return _pytree.tree_unflatten(given, out_form) if change is not None else None

        return seen

    handles = [model.get_submodule(n).register_forward_hook(hook(n), with_kwargs=True) for n in blocks]
    try:
        with contextlib.suppress(_Seen):
            run(batch)
    finally:
        for handle in handles:
            handle.remove()
    calls = {name: calls[0] for name, calls in found.items() if len(calls) == 1}
    for before, after in zip(blocks, blocks[1:], strict=False):
        if before in calls and after in calls:
            calls[after].link(calls[before])
    return calls


def stacks_in(model: nn.Module, blocks: Sequence[str], run: Run) -> list[list[str]]:
    """Runs of blocks, in their order, of which each takes what the one before gives out; single ones, too."""
    with layers.evaluating(model), torch.no_grad():
        calls = calls_of(model, blocks, run, 0)
    found: list[list[str]] = []
    for name in blocks:
        linked = name in calls and calls[name].links and found and found[-1][-1] in calls
        found[-1].append(name) if linked else found.append([name])
    return [part for run_of in found for part in ([run_of] if len(run_of) >= SHORTEST else [[b] for b in run_of])]


class Stack:
    """A stack in one task's model: for every batch, what goes into the block that is at the top.

    run      runs the model on a batch; nothing before the stack may change any more
    batches  how many there are

    Raises NoStack where the blocks are none.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[str], run: Run, batches: int):
        self.model, self.blocks, self.at = model, list(blocks), 0
        with layers.evaluating(model), torch.no_grad():
            self.calls = [self._tried(run) if batch == 0 else self._noted(run, batch) for batch in range(batches)]

    def _noted(self, run: Run, batch: int) -> list[Call]:
        """The calls of one batch, without the tensors that are carried."""
        calls = calls_of(self.model, self.blocks, run, batch, whole=False)
        if len(calls) != len(self.blocks) or not all(calls[name].links for name in self.blocks[1:]):
            raise NoStack
        for call in calls.values():
            for place in call.links:
                call.taken[place] = None
            call.given = []
        return [calls[name] for name in self.blocks]

    def _tried(self, run: Run) -> list[Call]:
        calls = calls_of(self.model, self.blocks, run, 0)
        if len(calls) != len(self.blocks):
            raise NoStack
        for name, call in calls.items():
            try:
                alone = call(self.model.get_submodule(name))
            except Exception as error:  # whatever a block does that is called where it is not meant to be
                raise NoStack from error
            if not _same(alone, call.given):
                raise NoStack
        disturbed = calls_of(self.model, self.blocks, run, 0, change=lambda x: x + 1)
        for name in self.blocks[1:]:
            besides = [
                [x for i, x in enumerate(c[name].taken) if i not in calls[name].links] for c in (calls, disturbed)
            ]
            if not _same(*besides):
                raise NoStack
        return self._noted(run, 0)

    def run(self, batch: int) -> None:
        """The block at the top, by itself."""
        with layers.evaluating(self.model), torch.no_grad():
            self.calls[batch][self.at](self.model.get_submodule(self.blocks[self.at]))

    def advance(self) -> None:
        """Goes on to the next block, with what this one gives out now."""
        module = self.model.get_submodule(self.blocks[self.at])
        self.at += 1
        with layers.evaluating(self.model), torch.no_grad():
            for calls in self.calls:
                given = calls[self.at - 1](module)
                calls[self.at - 1].taken = []
                for place, origin in calls[self.at].links.items():
                    calls[self.at].taken[place] = given[origin]


def _same(some: Sequence[Any], others: Sequence[Any]) -> bool:
    """Tensors bit for bit, plain values by value; anything else is the same only if it is one object."""
    if len(some) != len(others):
        return False
    return all(map(_is_same, some, others))


def _is_same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    return a is b or isinstance(a, PLAIN) and type(a) is type(b) and a == b
