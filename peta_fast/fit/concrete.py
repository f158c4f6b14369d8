"""Concrete subspace learning: one mask for all tasks, by minimizing the entropy of the merged model's answers.

    m = sigmoid((logit + log u - log(1 - u)) / temperature);   theta = base + sum_t lambda_t (tau_t m) / mean(m)

Concrete task arithmetic learns the logits with lambda fixed. Concrete AdaMerging learns them on two levels: each step
adapts lambda by one step of Adam from its start (learning rate 1, moments kept), and takes the logits' step with that
lambda; then the mask is drawn once and kept, and lambda is learned by AdaMerging within it. No second-order terms.

State: 12 bytes a parameter (logit and two moments; the logits' gradient never exists) besides base, task vectors and
one merged model with its gradients. With lambda fixed the task vectors are summed up first: one, whatever T.
Source: Tang et al., Concrete subspace learning, 2023, arXiv:2312.06173; defaults as there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from peta_fast.errors import RecipeError
from peta_fast.fit._merged_model import MergedModel, Model
from peta_fast.fit._results import KINDS, Fitted, Masks
from peta_fast.fit._steps import Coefficients, History, Progress, check_positive, check_steps
from peta_fast.fit._unfinished import Unfinished
from peta_fast.fit.adamerging import PHASE, learn_coefficients
from peta_fast.fit.tasks import Task, check_loss
from peta_fast.ops.concrete_mask import Adam, Piece, dispatch
from peta_fast.ops.concrete_mask.noise import mask_key


def concrete_task_arithmetic(
    model: nn.Module,
    models: Sequence[Model],
    tasks: Sequence[Task],
    *,
    base: Model | None = None,
    heads: Sequence[str] = (),
    scaling: float | Sequence[float] = 0.3,
    learning_rate: float = 1e-3,
    steps: int = 2000,
    temperature: float = 0.5,
    initial_logit: float = 0.0,
    mask: str = "soft",
    loss: str = "entropy",
    seed: int = 0,
    unfinished: str | Path | None = None,
    save_every: int = 100,
    progress: Callable[[Progress], None] | None = None,
) -> Fitted:
    """Learns the mask of task arithmetic; `model` becomes the merged model, in place.

    model, models, tasks, base, heads, loss, unfinished, save_every, progress   as in fit.adamerging.adamerging
    scaling        lambda: one number, or one a model
    learning_rate  of Adam on the logits
    initial_logit  where they start: 0 lets each entry through with probability 1/2
    mask           what the merged model has in the end: "soft", one sample, as in the paper; "binary", 1 where that
                   sample is above 1/2, else 0; "expected", sigmoid(logit)
    seed           of the masks' noise

    Returns Fitted, whose save_masks writes what masked_task_arithmetic merges with. Raises as adamerging does.
    """
    _check(loss, mask, steps=steps, learning_rate=learning_rate, temperature=temperature)
    summed = Coefficients.spread(scaling, len(models), "scaling")
    merged = MergedModel(model, models, tasks, base=base, heads=heads, summed=summed)
    learner = MaskLearner(merged, seed, temperature, initial_logit, learning_rate)
    history = History(merged, progress)
    ones = torch.ones(len(merged.names), 1, device=merged.device)
    settings = {
        "concrete": summed.tolist(), "rate": learning_rate, "steps": steps, "temperature": temperature,
        "logit": initial_logit, "mask": mask, "loss": loss, "seed": seed,
    }  # fmt: skip
    state = Unfinished(unfinished, save_every, merged, history, settings)
    learner.restore(state)
    with merged.fitting():
        for step in range(1 + state.done, steps + 1):
            learner.draw(step)
            merged.rebuild(ones, temperature)
            history.note("masks", step, steps, merged.backward(loss))
            learner.step(history)
            state.keep("masks", step, learner.kept)
        masks = learner.fix(steps + 1, mask)
        merged.rebuild(ones)
    state.remove()
    return Fitted(merged, summed.expand(len(merged.names), -1), history.steps, masks)


def concrete_adamerging(
    model: nn.Module,
    models: Sequence[Model],
    tasks: Sequence[Task],
    *,
    base: Model | None = None,
    heads: Sequence[str] = (),
    granularity: str = "layer",
    initial: float | Sequence[float] = 0.3,
    learning_rate: float = 1e-3,
    steps: int = 2000,
    inner_learning_rate: float = 1.0,
    resample: bool = True,
    coefficient_learning_rate: float = 1e-3,
    coefficient_steps: int = 1000,
    clamp: bool = True,
    temperature: float = 0.5,
    initial_logit: float = 0.0,
    mask: str = "soft",
    loss: str = "entropy",
    seed: int = 0,
    unfinished: str | Path | None = None,
    save_every: int = 100,
    progress: Callable[[Progress], None] | None = None,
) -> Fitted:
    """Learns a mask on two levels and then coefficients within it; `model` becomes the merged model, in place.

    model, models, tasks, base, heads, granularity, initial, clamp, loss, unfinished, save_every, progress   as in
                         adamerging
    learning_rate, steps, temperature, initial_logit, mask, seed   as in concrete_task_arithmetic
    inner_learning_rate  of the coefficients' one step from their start, in every step of the logits; with 1, Adam's
                         first step has length 1, so that clamped coefficients become 0 or 1
    resample             draw another mask for the second half of a step; False keeps the first
    coefficient_learning_rate, coefficient_steps   of AdaMerging within the fixed mask

    Returns Fitted. Raises as adamerging does.
    """
    _check(loss, mask, steps=steps, learning_rate=learning_rate, temperature=temperature)
    check_positive(inner_learning_rate=inner_learning_rate, coefficient_learning_rate=coefficient_learning_rate)
    check_steps(coefficient_steps=coefficient_steps)
    merged = MergedModel(model, models, tasks, base=base, heads=heads)
    inner = Coefficients(merged, granularity, initial, inner_learning_rate, clamp)
    learner = MaskLearner(merged, seed, temperature, initial_logit, learning_rate)
    history = History(merged, progress)
    settings = {
        "concrete": granularity, "initial": initial, "rate": learning_rate, "steps": steps, "temperature": temperature,
        "inner": inner_learning_rate, "resample": resample, "outer": coefficient_learning_rate, "then":
        coefficient_steps, "clamp": clamp, "logit": initial_logit, "mask": mask, "loss": loss, "seed": seed,
    }  # fmt: skip
    state = Unfinished(unfinished, save_every, merged, history, settings)
    learner.restore(state)
    inner.restore(state.take("inner"))
    with merged.fitting():
        for step in range(1 + (steps if state.phase == PHASE else state.done), steps + 1):
            inner.reset()
            learner.draw(2 * step - 1)
            merged.rebuild(inner.current(), temperature)
            history.note("inner", step, steps, merged.backward(loss))
            inner.step(history.check(merged.coefficient_gradients(temperature)))
            if resample:
                learner.draw(2 * step)
            merged.rebuild(inner.current(), temperature)
            history.note("masks", step, steps, merged.backward(loss))
            learner.step(history)
            state.keep("masks", step, lambda: {"inner": inner.kept(), **learner.kept()})
        masks = learner.fix(2 * steps + 1, mask)
        outer = Coefficients(merged, granularity, initial, coefficient_learning_rate, clamp)
        learn_coefficients(merged, outer, history, coefficient_steps, loss, state, {"logits": masks.logits})
    state.remove()
    return Fitted(merged, outer.current().clone(), history.steps, masks)


class MaskLearner:
    """Logits and their two moments for every tensor of a merged model; Adam, fused with the logits' gradient."""

    def __init__(self, merged: MergedModel, seed: int, temperature: float, initial: float, rate: float):
        self.merged, self.seed, self.temperature, self.rate, self.steps = merged, seed, temperature, rate, 0
        for piece in merged.pieces:
            piece.logits = torch.full_like(piece.task_vectors[0], initial)
        self.moments = [(torch.zeros_like(p.logits), torch.zeros_like(p.logits)) for p in merged.pieces]

    def draw(self, number: int) -> None:
        """The next rebuild has the masks of this draw."""
        for name, piece in zip(self.merged.names, self.merged.pieces, strict=True):
            piece.key = mask_key(self.seed, number, name)

    @torch.no_grad()
    def step(self, history: History) -> None:
        """One step of the logits, from the gradients that the pieces hold; these are used up."""
        merged, self.steps = self.merged, self.steps + 1
        products = all(p.g.dtype == torch.float32 for p in merged.pieces)
        found = history.check(merged.coefficient_gradients(self.temperature, products))
        shifts = [
            dispatch.shift_of(row, g, p.mean, p.size)
            for row, g, p in zip(merged.coefficients, found, merged.pieces, strict=True)
        ]
        pieces = (
            [Piece(logits=p.logits, key=p.key, g=p.g, mean=p.mean) for p in merged.pieces]
            if products
            else merged.pieces
        )
        dispatch.adam(pieces, shifts, self.temperature, self.moments, Adam(self.rate, self.steps))

    def kept(self) -> dict[str, dict[str, Tensor]]:
        """What a later run needs to go on."""
        names = self.merged.names
        first, second = zip(*self.moments, strict=True)
        parts = {"logits": [p.logits for p in self.merged.pieces], "first": first, "second": second}
        steps = {"steps": torch.tensor([float(self.steps)])}
        return {"adam": steps, **{part: dict(zip(names, tensors, strict=True)) for part, tensors in parts.items()}}

    @torch.no_grad()
    def restore(self, state: Unfinished) -> None:
        """Goes on from what an earlier run has kept, if anything."""
        logits, first, second = (state.take(name) for name in ("logits", "first", "second"))
        self.steps = int(state.take("adam").get("steps", torch.zeros(1)))
        for name, piece, moments in zip(self.merged.names, self.merged.pieces, self.moments, strict=True):
            if name in logits:
                piece.logits.copy_(logits[name])
            if name in first:
                moments[0].copy_(first[name])
                moments[1].copy_(second[name])

    @torch.no_grad()
    def fix(self, number: int, kind: str) -> Masks:
        """Draws once more, multiplies every task vector by its mask / mean, in place, and drops the logits' state."""
        logits = {n: p.logits for n, p in zip(self.merged.names, self.merged.pieces, strict=True)}
        masks = Masks({n: x.cpu() for n, x in logits.items()}, self.temperature, self.seed, number)
        self.moments.clear()
        self.draw(number)
        for name, piece in zip(self.merged.names, self.merged.pieces, strict=True):
            (mean,) = dispatch.means([piece], self.temperature)
            values = Masks(logits, self.temperature, self.seed, number).of(name, kind).float()
            piece.logits, piece.mean = None, None
            apply_mask(piece.task_vectors, values, mean if kind == "soft" else values.double().mean())
        return masks


def apply_mask(task_vectors: Sequence[Tensor], mask: Tensor, mean: Tensor) -> None:
    """tau m / mean, in place, rounded as masked_task_arithmetic rounds; zeros where the mask keeps nothing."""
    inverse = torch.where(mean > 0, 1 / mean, torch.zeros_like(mean)).float()
    for vector in task_vectors:
        vector.mul_(mask).mul_(inverse)


def _check(loss: str, mask: str, *, steps: int, learning_rate: float, temperature: float) -> None:
    check_loss(loss)
    if mask not in KINDS:
        raise RecipeError("mask", f"expected one of {', '.join(KINDS)}, got {mask!r}")
    check_positive(learning_rate=learning_rate, temperature=temperature)
    check_steps(steps=steps)
