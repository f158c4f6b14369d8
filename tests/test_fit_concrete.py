"""Concrete task arithmetic and Concrete AdaMerging: steps against autograd, masks on disk and back, real digits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from fit_cases import DIGITS, batches_of, digits_accuracy, digits_entropy, digits_tasks, toy_family
from philox_reference import uniforms
from safetensors.torch import load_file, save_file
from torch import Tensor

from peta_fast.errors import PetaFastError, RecipeError, ResourceError
from peta_fast.fit._results import bits_of
from peta_fast.fit.adamerging import adamerging
from peta_fast.fit.concrete import concrete_adamerging, concrete_task_arithmetic
from peta_fast.fit.tasks import Task, entropy
from peta_fast.merging import merge, merge_state_dicts
from peta_fast.ops.concrete_mask.reference import mask_reference, merge_reference

SEED = 5

# ---------------------------------------------------------------- the same steps in fp64, by autograd


class Plain:
    """Both algorithms as the paper writes them, in fp64: autograd through the masked merge, torch.optim.Adam."""

    def __init__(self, tasks: int):
        self.model, self.base, self.tuned = toy_family(tasks)
        self.model = self.model.double()
        self.vectors = {n: [s[n].double() - self.base[n].double() for s in self.tuned] for n in self.base}
        self.logits = {n: torch.zeros(t.shape, dtype=torch.float64, requires_grad=True) for n, t in self.base.items()}
        self.batches = [b.double() for b in batches_of(4)]
        self.next = 0

    def masks(self, draw: int) -> dict[str, Tensor]:
        found = {}
        for name, logits in self.logits.items():
            u = torch.from_numpy(uniforms(SEED, draw, name, logits.numel())).double().reshape(logits.shape)
            found[name] = mask_reference(logits, u.clamp(2.0**-23, 1 - 2.0**-23))
        return found

    def merged(self, coefficients: dict[str, Tensor], masks: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            n: merge_reference(b.double(), self.vectors[n], coefficients[n], masks[n]) for n, b in self.base.items()
        }

    def loss(self, state: dict[str, Tensor]) -> Tensor:
        batch, self.next = self.batches[self.next % 4], self.next + 1
        return entropy(torch.func.functional_call(self.model, state, (batch,)))


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].double(), tensor.detach().double(), rtol=0, atol=tolerance, msg=name)


def test_task_arithmetic_takes_the_steps_of_the_paper():
    plain = Plain(2)
    optimizer = torch.optim.Adam(plain.logits.values(), lr=0.1)
    lambdas = {n: torch.tensor([0.4, 0.2], dtype=torch.float64) for n in plain.base}
    losses = []
    for step in range(1, 7):
        optimizer.zero_grad()
        loss = plain.loss(plain.merged(lambdas, plain.masks(step)))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model, base, tuned = toy_family(2)
    fitted = concrete_task_arithmetic(
        model, tuned, [Task("t", batches_of(4))], base=base, scaling=[0.4, 0.2], learning_rate=0.1, steps=6, seed=SEED
    )
    assert [p.loss for p in fitted.history] == pytest.approx(losses, rel=1e-5)
    assert_same(dict(fitted.masks.logits), plain.logits, 2e-3)
    assert_same(fitted.state_dict(), plain.merged(lambdas, plain.masks(7)), 1e-3)


@pytest.mark.parametrize("granularity", ["task", "layer"])
@pytest.mark.parametrize("resample", [True, False])
def test_adamerging_takes_the_steps_of_the_paper(granularity, resample):
    plain, steps = Plain(2), 3
    optimizer = torch.optim.Adam(plain.logits.values(), lr=0.1)
    names = list(plain.base)
    rows = 1 if granularity == "task" else len(names)
    values = torch.full((rows, 2), 0.3, dtype=torch.float64, requires_grad=True)

    def lambdas() -> dict[str, Tensor]:
        return dict(zip(names, values.expand(len(names), 2), strict=True))

    losses, inner = [], torch.optim.Adam([values], lr=0.05)
    for step in range(1, steps + 1):
        with torch.no_grad():
            values.fill_(0.3)
        for half in (0, 1):
            inner.zero_grad()
            optimizer.zero_grad()
            loss = plain.loss(plain.merged(lambdas(), plain.masks(2 * step if half and resample else 2 * step - 1)))
            loss.backward()
            (optimizer if half else inner).step()
            losses.append(loss.item())
    masks = {n: m.detach() for n, m in plain.masks(2 * steps + 1).items()}
    with torch.no_grad():
        values.fill_(0.3)
    outer = torch.optim.Adam([values], lr=0.02)
    for _ in range(2):
        outer.zero_grad()
        loss = plain.loss(plain.merged(lambdas(), masks))
        loss.backward()
        outer.step()
        losses.append(loss.item())

    model, base, tuned = toy_family(2)
    fitted = concrete_adamerging(
        model, tuned, [Task("t", batches_of(4))], base=base, granularity=granularity, learning_rate=0.1, steps=steps,
        inner_learning_rate=0.05, resample=resample, coefficient_learning_rate=0.02, coefficient_steps=2, seed=SEED,
    )  # fmt: skip
    assert [p.phase for p in fitted.history] == ["inner", "masks"] * steps + ["coefficients"] * 2
    assert [p.loss for p in fitted.history] == pytest.approx(losses, rel=1e-5)
    assert_same(fitted.coefficients, lambdas(), 1e-4)
    assert_same(dict(fitted.masks.logits), plain.logits, 2e-3)
    assert_same(fitted.state_dict(), plain.merged(lambdas(), masks), 1e-3)


# ---------------------------------------------------------------- masks elsewhere


def fitted_toy(method=concrete_adamerging, **options):
    model, base, tuned = toy_family(3)
    settings = {"steps": 3, "learning_rate": 0.5, "seed": SEED} | options
    if method is concrete_adamerging:
        settings |= {"coefficient_steps": 3, "coefficient_learning_rate": 0.05}
    return base, tuned, method(model, tuned, [Task("t", batches_of(4))], base=base, **settings)


@pytest.mark.parametrize("kind", ["soft", "binary", "expected"])
@pytest.mark.parametrize("granularity", ["task", "layer"])
def test_masked_task_arithmetic_gives_the_fitted_model_bit_by_bit(kind, granularity, tmp_path):
    base, tuned, fitted = fitted_toy(granularity=granularity, mask=kind)
    fitted.save_masks(tmp_path / "masks.safetensors", kind)
    assert [file.name for file in tmp_path.iterdir()] == ["masks.safetensors"]
    again = merge_state_dicts(
        base, tuned, method="masked_task_arithmetic", mask=tmp_path / "masks.safetensors", mask_rescale="mean",
        weight=fitted.weights(),
    )  # fmt: skip
    for name, tensor in fitted.state_dict().items():
        assert not torch.equal(tensor, base[name])
        assert torch.equal(tensor, again[name]), name


@pytest.mark.parametrize("kind", ["soft", "binary"])
def test_concrete_task_arithmetic_is_the_same_merge_but_for_one_rounding(kind):
    """Its task vectors are summed up before they are masked."""
    base, tuned, fitted = fitted_toy(concrete_task_arithmetic, mask=kind)
    masks = fitted.mask_tensors(kind)
    again = merge_state_dicts(
        base, tuned, method="masked_task_arithmetic", mask=masks, mask_rescale="mean", weight=0.3
    )  # fmt: skip
    for name, tensor in fitted.state_dict().items():
        torch.testing.assert_close(tensor, again[name], rtol=1e-5, atol=1e-6)


def test_the_recipe_merges_the_checkpoints_on_disk(tmp_path):
    base, tuned, fitted = fitted_toy()
    for name, state in {"base": base, "a": tuned[0], "b": tuned[1], "c": tuned[2]}.items():
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    fitted.save_masks(tmp_path / "masks.safetensors")
    folders = [tmp_path / name for name in "abc"]
    fitted.save_recipe(tmp_path / "recipe.yml", tmp_path / "base", folders, tmp_path / "masks.safetensors")
    merge(tmp_path / "recipe.yml", tmp_path / "out")
    again = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in fitted.state_dict().items():
        assert torch.equal(tensor, again[name]), name
    with pytest.raises(RecipeError, match="expected 3 models and a mask file"):
        fitted.recipe(tmp_path / "base", folders)


def test_binary_masks_are_little_endian_bits():
    mask = torch.tensor([1, 0, 0, 1, 0, 0, 0, 0, 0, 1], dtype=torch.bool)
    assert bits_of(mask).tolist() == [0b1001, 0b10]
    noise = torch.rand(1003, generator=torch.Generator().manual_seed(0)) > 0.5
    assert np.array_equal(np.unpackbits(bits_of(noise).numpy(), bitorder="little", count=1003), noise.numpy())


def test_what_stays_out_of_the_merge_has_a_mask_of_zeros():
    model, base, tuned = toy_family(2)
    for state in tuned:
        state["body.bias"] = base["body.bias"]
    tasks = [Task(str(t), batches_of(2)) for t in range(2)]
    fitted = concrete_task_arithmetic(model, tuned, tasks, base=base, heads=["head"], steps=1)
    masks = fitted.mask_tensors()
    assert {n for n, m in masks.items() if m.dtype == torch.uint8} == {"body.bias", "head.weight", "head.bias"}
    assert not any(masks[n].any() for n in ("body.bias", "head.weight", "head.bias"))
    again = merge_state_dicts(
        base, tuned, method="masked_task_arithmetic", mask=masks, mask_rescale="mean", weight=fitted.weights()
    )
    for name in ("body.bias", "head.weight", "head.bias"):
        assert torch.equal(again[name], base[name])
        assert torch.equal(fitted.state_dict()[name], base[name])


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    import os

    _, _, fitted = fitted_toy(concrete_task_arithmetic)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(ResourceError, match="cannot be put in place: full"):
        fitted.save_masks(tmp_path / "masks.safetensors")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- real digits


def test_on_digits_a_learned_mask_lowers_the_entropy_and_keeps_the_accuracy():
    digits = DIGITS()
    settings = {"base": digits.base, "learning_rate": 0.01}
    concrete_task_arithmetic(digits.model, digits.tuned, digits_tasks(digits), steps=0, **settings)
    random = digits_entropy(digits), digits_accuracy(digits)
    adamerging(digits.model, digits.tuned, digits_tasks(digits), base=digits.base, steps=0)
    plain = digits_entropy(digits), digits_accuracy(digits)
    concrete_task_arithmetic(digits.model, digits.tuned, digits_tasks(digits), steps=60, **settings)
    learned = digits_entropy(digits), digits_accuracy(digits)
    assert learned[0] < 0.98 * min(plain[0], random[0])
    assert learned[1] >= max(plain[1], random[1]) - 0.005  # of 1988 images, ten


def test_on_digits_two_levels_do_better_than_a_fixed_lambda():
    digits = DIGITS()
    tasks = digits_tasks(digits)
    adamerging(digits.model, digits.tuned, tasks, base=digits.base, steps=0)
    plain = digits_entropy(digits), digits_accuracy(digits)
    fitted = concrete_adamerging(
        digits.model, digits.tuned, tasks, base=digits.base, steps=20, learning_rate=0.01, inner_learning_rate=0.3,
        coefficient_steps=40, coefficient_learning_rate=0.01,
    )  # fmt: skip
    assert digits_entropy(digits) < 0.95 * plain[0]
    assert digits_accuracy(digits) > plain[1]
    assert len(fitted.history) == 80


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not():
    found = [fitted_toy(seed=seed)[2].state_dict()["body.weight"] for seed in (1, 1, 2)]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_progress_is_told_after_every_step():
    told = []
    _, _, fitted = fitted_toy(progress=told.append)
    assert tuple(told) == fitted.history
    assert [(p.phase, p.step, p.steps) for p in told[:3]] == [("inner", 1, 3), ("masks", 1, 3), ("inner", 2, 3)]


# ---------------------------------------------------------------- memory and bad input


def test_with_lambda_fixed_one_task_vector_is_kept_whatever_their_number():
    from peta_fast.fit._merged_model import MergedModel

    model, base, tuned = toy_family(3)
    merged = MergedModel(model, tuned, [Task("t", batches_of(1))], base=base, summed=[0.1, 0.2, 0.3])
    assert all(len(piece.task_vectors) == 1 for piece in merged.pieces)
    differences = [state["body.weight"].double() - base["body.weight"].double() for state in tuned]
    expected = 0.1 * differences[0] + 0.2 * differences[1] + 0.3 * differences[2]
    torch.testing.assert_close(merged.pieces[0].task_vectors[0].double(), expected, rtol=1e-5, atol=1e-7)


def test_learning_keeps_twelve_bytes_a_parameter():
    from peta_fast.fit._merged_model import MergedModel
    from peta_fast.fit.concrete import MaskLearner

    model, base, tuned = toy_family(3)
    merged = MergedModel(model, tuned, [Task("t", batches_of(1))], base=base)
    learner = MaskLearner(merged, 0, 0.5, 0.0, 1e-3)
    state = [p.logits for p in merged.pieces] + [m for pair in learner.moments for m in pair]
    assert sum(t.nbytes for t in state) == 12 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("method", [concrete_task_arithmetic, concrete_adamerging])
def test_a_loss_that_is_not_finite_stops_with_its_step(method):
    model, base, tuned = toy_family(2)
    batches = [*batches_of(2), torch.full((6, 5), math.nan)]
    with pytest.raises(PetaFastError, match=r"task 't': its loss is nan in step [23] of 8 \((masks|inner)\)"):
        method(model, tuned, [Task("t", batches)], base=base, steps=8)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, base[name])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mask": "hard"}, "mask: expected one of soft, binary, expected"),
        ({"temperature": 0}, "temperature: expected a positive number"),
        ({"scaling": [1.0]}, "scaling: expected one finite number or 3"),
        ({"steps": 1.5}, "steps: expected a number of steps"),
        ({"loss": "x"}, "loss: expected one of"),
    ],
    ids=lambda v: "" if isinstance(v, str) else next(iter(v)),
)
def test_settings_are_checked(options, message):
    with pytest.raises(RecipeError, match=message):
        fitted_toy(concrete_task_arithmetic, **options)


def test_coefficients_alone_have_no_masks():
    model, base, tuned = toy_family(2)
    fitted = adamerging(model, tuned, [Task("t", batches_of(1))], base=base, steps=1)
    with pytest.raises(RecipeError, match="coefficients alone"):
        fitted.mask_tensors()
    _, _, concrete = fitted_toy()
    with pytest.raises(RecipeError, match="kind: expected one of"):
        concrete.mask_tensors("hard")
