"""A step of Concrete subspace learning, ours and as it is usually written, and what each keeps in memory.

usage: concrete_steps.py WAY KIND ELEMENTS TASKS      prints the bytes that three steps take above their inputs, at most

A step is all but the network: masks are drawn, the model merged, and, from the merged model's gradient, the logits take
a step of Adam. KIND "task_arithmetic" has lambda fixed; with "adamerging" lambda takes a step too, between two merges.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from peta_fast.ops.concrete_mask import Adam, Piece, dispatch
from peta_fast.ops.concrete_mask.noise import mask_key, uniforms
from peta_fast.ops.concrete_mask.reference import gradients_reference, mask_reference, merge_reference

COLUMNS = 1024
RATE, TEMPERATURE = 1e-3, 0.5
KINDS = ("task_arithmetic", "adamerging")


class Inputs:
    """Matrices of 1024 columns and at most as many rows: base, gradient and T task vectors each, all fp32."""

    def __init__(self, elements: int, tasks: int, device: str = "cpu"):
        self.elements, self.tasks = elements, tasks
        generator = torch.Generator(device).manual_seed(0)
        rows = elements // COLUMNS
        self.rows = [min(COLUMNS, rows - first) for first in range(0, rows, COLUMNS)]

        def normal(scale: float) -> list[Tensor]:
            drawn = (torch.empty(r, COLUMNS, device=device) for r in self.rows)
            return [t.normal_(0, scale, generator=generator) for t in drawn]

        self.base, self.g = normal(0.02), normal(1e-3)
        self.vectors = list(zip(*(normal(0.002) for _ in range(tasks)), strict=True))
        self.coefficients = torch.full((tasks,), 0.3, device=device)


class Ours:
    """As peta_fast.fit.concrete does it: with lambda fixed the task vectors are summed up once."""

    def __init__(self, inputs: Inputs, kind: str):
        self.inputs, self.kind, self.steps = inputs, kind, 0
        vectors, self.coefficients = inputs.vectors, inputs.coefficients
        if kind == "task_arithmetic":
            vectors = [[sum(c * x for c, x in zip(self.coefficients, some, strict=True))] for some in vectors]
            self.coefficients = torch.ones(1, device=self.coefficients.device)
        self.pieces = [
            Piece(some, self.coefficients, torch.zeros_like(base), base=base, out=torch.empty_like(base))
            for some, base in zip(vectors, inputs.base, strict=True)
        ]
        self.moments = [(torch.zeros_like(p.base), torch.zeros_like(p.base)) for p in self.pieces]
        self.values = self.coefficients.clone()
        self.inner = torch.optim.Adam([self.values], lr=RATE)

    def step(self) -> None:
        self.steps += 1
        if self.kind == "adamerging":
            self.merge(2 * self.steps, self.coefficients)
            self.values.grad = sum(dispatch.coefficient_gradients(self.pieces, TEMPERATURE)).float()
            self.values.copy_(self.coefficients)
            self.inner.step()
        self.merge(2 * self.steps + 1, self.values)
        found = dispatch.coefficient_gradients(self.pieces, TEMPERATURE, products=True)
        shifts = [dispatch.shift_of(self.values, s, p.mean, p.size) for s, p in zip(found, self.pieces, strict=True)]
        rest = [Piece(logits=p.logits, key=p.key, g=p.g, mean=p.mean) for p in self.pieces]
        dispatch.adam(rest, shifts, TEMPERATURE, self.moments, Adam(RATE, self.steps))

    def merge(self, draw: int, coefficients: Tensor) -> None:
        for place, (piece, g) in enumerate(zip(self.pieces, self.inputs.g, strict=True)):
            piece.key, piece.g, piece.coefficients = mask_key(0, draw, str(place)), g, coefficients
        dispatch.means(self.pieces, TEMPERATURE)
        dispatch.merge(self.pieces, TEMPERATURE)


class Reference:
    """As it is usually written: a relaxed Bernoulli sample, T masked task vectors, autograd, torch.optim.Adam."""

    def __init__(self, inputs: Inputs, kind: str):
        self.inputs, self.kind = inputs, kind
        self.logits = [torch.zeros_like(b, requires_grad=True) for b in inputs.base]
        self.values = inputs.coefficients.clone().requires_grad_(kind == "adamerging")
        self.outer = torch.optim.Adam(self.logits, lr=RATE)
        self.inner = torch.optim.Adam([self.values], lr=RATE) if kind == "adamerging" else None

    def step(self) -> None:
        if self.inner is not None:
            with torch.no_grad():
                self.values.copy_(self.inputs.coefficients)
            self.backward()
            self.inner.step()
            self.inner.zero_grad()
            self.outer.zero_grad()
        self.backward()
        self.outer.step()
        self.outer.zero_grad()

    def backward(self) -> None:
        temperature = torch.tensor(TEMPERATURE, device=self.values.device)
        masks = [torch.distributions.RelaxedBernoulli(temperature, logits=x).rsample() for x in self.logits]
        merged = [
            merge_reference(base, some, self.values, mask)
            for base, some, mask in zip(self.inputs.base, self.inputs.vectors, masks, strict=True)
        ]
        torch.autograd.backward(merged, self.inputs.g)


WAYS: dict[str, Callable[[Inputs, str], Ours | Reference]] = {"ours": Ours, "reference": Reference}


def moved_bytes(kind: str, elements: int, tasks: int) -> int:
    """What our passes read and write: mean 4, merge 4 T + 12, reduce 4 T + 8 (+ 4), update 28 bytes an element."""
    inner = 8 * tasks + 24 if kind == "adamerging" else 0
    vectors = tasks if kind == "adamerging" else 1
    return elements * (inner + 8 * vectors + 56)


def largest_error(ours: Ours) -> float:
    """Of theta and of the gradients of logits and lambda against fp64, relative to the largest value of each."""
    ours.merge(10**6, ours.coefficients)
    found, worst = dispatch.coefficient_gradients(ours.pieces, TEMPERATURE), 0.0
    for piece, sums in zip(ours.pieces, found, strict=True):
        shift = dispatch.shift_of(piece.coefficients, sums, piece.mean, piece.size)
        (gradient,) = dispatch.logit_gradients([piece], [shift], TEMPERATURE)
        u = uniforms(piece.key, 0, piece.size, torch.float64, gradient.device).reshape(gradient.shape)
        mask, vectors = mask_reference(piece.logits.double(), u), [x.double() for x in piece.task_vectors]
        coefficients = piece.coefficients.double()
        exact = gradients_reference(piece.g.double(), vectors, coefficients, mask)
        theta = merge_reference(piece.base.double(), vectors, coefficients, mask)
        for value, truth in zip((gradient, sums, piece.out), (*exact, theta), strict=True):
            worst = max(worst, ((value.double() - truth).abs().max() / truth.abs().max()).item())
    return worst


def bytes_above_inputs(way: str, kind: str, elements: int, tasks: int) -> int:
    """Peak of this process's memory over three steps, without what it was with the inputs alone."""
    WAYS[way](Inputs(COLUMNS, tasks), kind).step()  # loads what is loaded once
    inputs = Inputs(elements, tasks)
    before = _status("VmRSS")
    runner = WAYS[way](inputs, kind)
    if way == "ours" and kind == "task_arithmetic":
        inputs.vectors = []  # summed up: nobody needs them any more
    for _ in range(3):
        runner.step()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    with open("/proc/self/status", encoding="ascii") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def main() -> None:
    way, kind, elements, tasks = sys.argv[1:]
    print(bytes_above_inputs(way, kind, int(elements), int(tasks)))


if __name__ == "__main__":
    main()
