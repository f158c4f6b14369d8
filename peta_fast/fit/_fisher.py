"""Squared gradients of single examples, summed over a batch: exact, from one backward pass where that is possible.

For layers that every example goes through once, an example's gradient follows from what went in and the gradient of
what came out, so a batch is one pass:

    linear     (sum_l g_l x_l^T)^2        one row an example: (g^2)^T (x^2)
    LayerNorm  (sum_l g_l xhat_l)^2       bias: (sum_l g_l)^2
    embedding  (sum over the places of a token of g_l)^2

Whether that holds for a model - no parameter shared, used without its module, or run twice - is not guessed but tried:
on the first batch the sums of these gradients must be those that autograd finds. Else each example goes alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from peta_fast.fit import _batches as batching
from peta_fast.fit._layers import gradients_of, is_transposed, watching

TILE = 1 << 24
"""Elements of single examples' gradients that are held at once."""
AGREEMENT = 1e-3
"""Of sums of gradients, relative to a tensor's largest: far above rounding, far below a gradient that is missing."""
NOISE = 1e-6
"""The same, relative to the largest of all tensors: a gradient that is zero but for rounding."""


def one_by_one(model: nn.Module, batch: Any, losses, first: int, wanted: dict[str, nn.Parameter]) -> Iterator[dict]:
    """The gradient of each example, name -> tensor; parameters that the loss does not reach are left out."""
    for i in range(batching.size_of(batch)):
        loss = losses(model, batching.part_of(batch, i, i + 1), first + i)
        found = torch.autograd.grad(loss.sum(), list(wanted.values()), allow_unused=True)
        yield {name: g.detach().float() for name, g in zip(wanted, found, strict=True) if g is not None}


class OnePass:
    """Adds squared gradients of all examples of a batch to totals, from one backward pass."""

    def __init__(self, model: nn.Module, wanted: dict[str, nn.Parameter]):
        self.model, self.wanted = model, wanted
        owners = {f"{m}.{p}" if m else p: (m, module) for m, module in model.named_modules()
                  for p, _ in module.named_parameters(recurse=False)}  # fmt: skip
        found = [owners.get(name) for name in wanted]
        self.modules = dict(owner for owner in found if owner is not None)
        self.possible = None not in found and all(map(_is_known, self.modules.values()))
        self.trusted = False

    def add(self, totals: dict[str, Tensor], batch: Any, losses, first: int) -> bool:
        """False, and nothing is added, where it is not possible; then it never is."""
        if not self.possible:
            return False
        inputs: list[tuple[str, Tensor]] = []
        outputs: list = []
        with watching(self.modules, lambda name, _, x: inputs.append((name, x.detach().clone())), outputs):
            found = losses(self.model, batch, first)
        edges = [edge for _, edge in outputs]
        gradients = gradients_of(found, edges) if self.trusted else self._all_gradients(found, edges)
        self.possible = self._is_single(inputs, outputs, batching.size_of(batch))
        if not self.possible:
            return False
        by_name = dict(inputs)
        squares: dict[str, Tensor] = {}
        sums: dict[str, Tensor] = {}
        for (name, _), gradient in zip(outputs, gradients, strict=True):
            if gradient is not None:
                parts = _single_gradients(name, self.modules[name], by_name[name], gradient.float(), not self.trusted)
                for key, square, total in parts:
                    squares[key], sums[key] = square, total
        if not self.trusted and not self._agree(sums):
            self.possible = False
            return False
        self.trusted = True
        for key in squares.keys() & totals.keys():
            totals[key] += squares[key]
        return True

    def _is_single(self, inputs, outputs, size: int) -> bool:
        names = [name for name, _ in inputs]
        return (
            len(set(names)) == len(names)
            and len(outputs) == len(names)
            and all(x.dim() > 0 and len(x) == size for _, x in inputs)
        )

    def _all_gradients(self, losses: Tensor, edges: list):
        """Of outputs, and of parameters for comparison."""
        found = torch.autograd.grad(losses.sum(), [*edges, *self.wanted.values()], allow_unused=True)
        self.expected = dict(zip(self.wanted, found[len(edges) :], strict=True))
        return found[: len(edges)]

    def _agree(self, sums: dict[str, Tensor]) -> bool:
        known = {name: g.float() for name, g in self.expected.items() if g is not None and g.numel()}
        noise = NOISE * max((g.abs().max().item() for g in known.values()), default=0.0)
        for name, expected in known.items():
            allowed = AGREEMENT * expected.abs().max().item() + noise
            if (sums.get(name, 0) - expected).abs().max().item() > allowed:
                return False
        return True


def _is_known(module: nn.Module) -> bool:
    if isinstance(module, nn.Embedding):
        return not (module.scale_grad_by_freq or module.max_norm)
    return isinstance(module, (nn.Linear, nn.LayerNorm)) or is_transposed(module)


def _single_gradients(name: str, module: nn.Module, x: Tensor, g: Tensor, with_sums: bool):
    """(parameter name, sum of squares over examples, sum over examples or None) of one module's parameters."""
    if isinstance(module, nn.Embedding):
        yield f"{name}.weight", *_embedding(module, x, g, with_sums)
        return
    x = x.float()
    if isinstance(module, nn.LayerNorm):
        x = nn.functional.layer_norm(x, module.normalized_shape, None, None, module.eps)
        if module.weight is not None:
            yield f"{name}.weight", *_of_rows((x * g).reshape(len(g), -1, *module.weight.shape))
    else:
        yield f"{name}.weight", *_products(*((x, g) if is_transposed(module) else (g, x)), with_sums)
    if module.bias is not None:
        yield f"{name}.bias", *_of_rows(g.reshape(len(g), -1, *module.bias.shape))


def _of_rows(gradients: Tensor) -> tuple[Tensor, Tensor]:
    """gradients [N, L, *S] -> sum over N of the square, and sum, of what is summed over L."""
    each = gradients.sum(1)
    return each.square().sum(0), each.sum(0)


def _products(left: Tensor, right: Tensor, with_sums: bool) -> tuple[Tensor, Tensor | None]:
    """left [N, *, a], right [N, *, b] -> [a, b]: sums of squares, and sums, of each example's left^T right."""
    total = left.flatten(0, -2).T @ right.flatten(0, -2) if with_sums else None
    left, right = left.reshape(len(left), -1, left.shape[-1]), right.reshape(len(right), -1, right.shape[-1])
    if left.shape[1] == 1:
        return left[:, 0].square().T @ right[:, 0].square(), total
    squares = left.new_zeros(left.shape[-1], right.shape[-1])
    step = max(1, TILE // squares.numel())
    for i in range(0, len(left), step):
        squares += torch.bmm(left[i : i + step].transpose(1, 2), right[i : i + step]).square_().sum(0)
    return squares, total


def _embedding(module: nn.Embedding, tokens: Tensor, g: Tensor, with_sums: bool) -> tuple[Tensor, Tensor | None]:
    squares = torch.zeros(module.weight.shape, device=g.device)
    total = torch.zeros_like(squares) if with_sums else None
    for places, gradient in zip(tokens.reshape(len(tokens), -1), g.reshape(len(tokens), -1, g.shape[-1]), strict=True):
        if module.padding_idx is not None:
            kept = places != module.padding_idx
            places, gradient = places[kept], gradient[kept]
        rows, where = places.unique(return_inverse=True)
        each = gradient.new_zeros(len(rows), gradient.shape[-1]).index_add_(0, where, gradient)
        squares.index_add_(0, rows, each.square())
        if total is not None:
            total.index_add_(0, rows, each)
    return squares, total
