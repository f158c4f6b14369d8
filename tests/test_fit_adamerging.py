"""AdaMerging: gradients against autograd, the paper example of the entropy, real digits, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from fit_cases import DIGITS, Toy, batches_of, digits_accuracy, digits_entropy, digits_tasks, toy_family
from model_folders import load, save_model
from torch import nn

import peta_fast
from peta_fast.errors import CheckpointError, CompatibilityError, PetaFastError, RecipeError
from peta_fast.fit._merged_model import MergedModel
from peta_fast.fit._trimming import kth_largest, trim
from peta_fast.fit.adamerging import adamerging
from peta_fast.fit.tasks import Task, endless, entropy, logits_of
from peta_fast.merging import merge_state_dicts

# ---------------------------------------------------------------- on paper


def test_the_entropy_of_the_worked_example():
    logits = torch.tensor([[2.0, 1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    found = entropy(logits)
    found.backward()
    assert found.item() == pytest.approx(0.832396, abs=1e-6)
    assert logits.grad[0].tolist() == pytest.approx([-0.282587, 0.140770, 0.141817], abs=1e-6)


def test_one_step_on_paper():
    """One weight [1, 2], tau = [1, 0] and [0, 2], lambda .3: dL/dlambda_t = <dL/dW, tau_t>; Adam's step is lr sign."""
    model, tuned = nn.Linear(2, 2, bias=False), [torch.tensor([[2.0, 2.0], [0, 0]]), torch.tensor([[1.0, 4.0], [0, 0]])]
    base = {"weight": torch.tensor([[1.0, 2.0], [0, 0]])}
    x = torch.tensor([[1.0, -1.0]])
    fitted = adamerging(
        model,
        [{"weight": w} for w in tuned],
        [Task("t", [x])],
        base=base,
        granularity="task",
        learning_rate=0.01,
        steps=1,
    )
    # row 0 of W starts at [1.3, 2.6], logits [-1.3, 0]: the entropy falls with the first of them, so lambda_1 falls
    assert fitted.coefficients["weight"].tolist() == pytest.approx([0.29, 0.31], abs=1e-6)
    assert model.weight[0].tolist() == pytest.approx([1.29, 2.62], abs=1e-6)
    p = 1 / (1 + math.exp(1.3))
    assert fitted.history[0].loss == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p), abs=1e-6)


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("layerwise", [True, False])
def test_coefficient_gradients_are_those_of_autograd_through_the_merge(layerwise):
    model, base, tuned = toy_family(3)
    model = model.double()
    batches = [b.double() for b in batches_of(2)]
    merged = MergedModel(model, tuned, [Task(str(t), [b]) for t, b in enumerate(batches)], base=base)
    values = torch.full((len(merged.names), 3), 0.3) + 0.1 * torch.arange(3)
    with merged.fitting():
        merged.rebuild(values)
        losses = merged.backward("entropy")
        found = merged.coefficient_gradients()
    leaf = (values[:1] if not layerwise else values).double().clone().requires_grad_()
    rows = leaf.expand(len(merged.names), -1)
    state = {
        name: base[name].double() + sum(row[t] * (tuned[t][name].double() - base[name].double()) for t in range(3))
        for name, row in zip(merged.names, rows, strict=True)
    }
    expected = [entropy(torch.func.functional_call(model, state, (b,))) for b in batches]
    sum(expected).backward()
    torch.testing.assert_close(losses.double(), torch.stack(expected).detach(), rtol=1e-5, atol=0)
    found = found if layerwise else found.sum(0, keepdim=True)
    torch.testing.assert_close(found.double(), leaf.grad, rtol=1e-4, atol=1e-7)


def test_without_steps_it_is_task_arithmetic():
    model, base, tuned = toy_family(2)
    fitted = adamerging(model, tuned, [Task("t", batches_of(1))], base=base, steps=0, initial=[0.2, 0.4])
    expected = merge_state_dicts(base, tuned, method="task_arithmetic", weight=[0.2, 0.4])
    for name, tensor in fitted.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("clamp", [True, False])
def test_coefficients_are_clamped_where_they_are_used(clamp):
    model, base, tuned = toy_family(2)
    tasks = [Task("t", batches_of(3))]
    fitted = adamerging(model, tuned, tasks, base=base, learning_rate=2.0, steps=3, clamp=clamp)
    found = torch.stack(list(fitted.coefficients.values()))
    assert ((found >= 0) & (found <= 1)).all() == clamp


def test_the_merge_elsewhere_has_the_same_bits():
    model, base, tuned = toy_family(3)
    fitted = adamerging(model, tuned, [Task("t", batches_of(4))], base=base, learning_rate=0.05, steps=5)
    again = merge_state_dicts(base, tuned, method="task_arithmetic", weight=fitted.weights())
    assert len({tuple(row.tolist()) for row in fitted.coefficients.values()}) > 1
    for name, tensor in fitted.state_dict().items():
        assert torch.equal(tensor, again[name]), name


# ---------------------------------------------------------------- trimmed task vectors


def test_the_kth_largest_magnitude_is_exact_over_all_tensors():
    vectors = [torch.randn(100, generator=torch.Generator().manual_seed(s)) for s in range(3)]
    vectors[0][:5] = vectors[1][0]
    everything = torch.cat(vectors).abs().sort(descending=True).values
    for k in (1, 2, 17, 150, 299, 300):
        assert kth_largest(vectors, k) == everything[k - 1]


def test_plus_plus_trims_over_the_whole_model_and_elects_when_told():
    model, base, tuned = toy_family(3)
    merged = MergedModel(model, tuned, [Task("t", batches_of(1))], base=base)
    before = [torch.cat([p.task_vectors[t].flatten() for p in merged.pieces]) for t in range(3)]
    trim(merged, 0.2)
    after = [torch.cat([p.task_vectors[t].flatten() for p in merged.pieces]) for t in range(3)]
    for old, new in zip(before, after, strict=True):
        k = int(0.2 * len(old))
        assert torch.equal(new, torch.where(old.abs() >= old.abs().sort(descending=True).values[k - 1], old, 0))
    trim(merged, 1.0, elect=True)
    elected = [torch.cat([p.task_vectors[t].flatten() for p in merged.pieces]) for t in range(3)]
    total = sum(after)
    for old, new in zip(after, elected, strict=True):
        assert torch.equal(new, torch.where(old * total > 0, old, 0))


@pytest.mark.parametrize("elect", [False, True])
def test_plus_plus_has_a_recipe_with_a_mask_a_task(tmp_path, elect):
    model, base, tuned = toy_family(2)
    fitted = adamerging(model, tuned, [Task("t", batches_of(1))], base=base, density=0.4, elect=elect, steps=3)
    for name, state in zip(("base", "a", "b"), (base, *tuned), strict=True):
        save_model(tmp_path / name, state)
    masks = tmp_path / "masks.safetensors"
    fitted.save_masks(masks)
    fitted.save_recipe(tmp_path / "recipe.yml", tmp_path / "base", [tmp_path / "a", tmp_path / "b"], masks)
    peta_fast.merge(tmp_path / "recipe.yml", tmp_path / "out")
    again = load(tmp_path / "out")
    for name, tensor in fitted.state_dict().items():
        assert torch.equal(tensor, again[name]), name
    changed = sum(int((again[n] != base[n]).sum()) for n in base)
    total = sum(t.numel() for t in base.values())
    assert 0.2 * total < changed < 0.85 * total
    with pytest.raises(RecipeError, match="expected 2 models and a mask file"):
        fitted.recipe("base", ["a", "b"])


# ---------------------------------------------------------------- real digits


@pytest.mark.parametrize("options", [{"granularity": "task"}, {"granularity": "layer"}, {"density": 0.2}], ids=str)
def test_on_digits_the_entropy_falls_and_the_accuracy_does_not(options):
    digits = DIGITS()
    start = adamerging(digits.model, digits.tuned, digits_tasks(digits), base=digits.base, steps=0, **options)
    before = digits_entropy(digits), digits_accuracy(digits)
    fitted = adamerging(
        digits.model, digits.tuned, digits_tasks(digits), base=digits.base, steps=60, learning_rate=0.01, **options
    )
    after = digits_entropy(digits), digits_accuracy(digits)
    assert len(fitted.history) == 60 and not start.history
    assert after[0] < 0.95 * before[0]
    assert after[1] > before[1] + 0.01


# ---------------------------------------------------------------- heads


def heads_family() -> tuple[nn.Module, dict, list[dict]]:
    model, base, tuned = toy_family(2)
    for place, classes in enumerate((3, 5)):
        generator = torch.Generator().manual_seed(place)
        tuned[place] |= {"head.weight": torch.randn(classes, 8, generator=generator), "head.bias": torch.zeros(classes)}
    return model, base, tuned


def test_heads_of_different_sizes_stay_out_of_the_merge():
    model, base, tuned = heads_family()
    seen = []

    def forward(model, batch):
        logits = model(batch)
        seen.append(logits.shape[-1])
        return logits

    tasks = [Task(str(t), batches_of(1), forward) for t in range(2)]
    fitted = adamerging(model, tuned, tasks, base=base, heads=["head"], steps=2, learning_rate=0.1)
    assert seen == [3, 5, 3, 5]
    assert not [name for name in fitted.coefficients if name.startswith("head")]
    assert torch.equal(fitted.heads[1]["head.weight"], tuned[1]["head.weight"])
    assert torch.equal(model.head.weight, base["head.weight"])
    assert not torch.equal(model.body.weight, base["body.weight"])


def test_heads_of_different_sizes_that_were_not_named_are_refused():
    model, base, tuned = heads_family()
    with pytest.raises(CompatibilityError, match=r"(?s)models\[0\]: 'head.weight' is \[3, 8\].*heads=\['head'\]"):
        adamerging(model, tuned, [Task("t", batches_of(1))], base=base)
    with pytest.raises(RecipeError, match="a model for each of 1 tasks"):
        adamerging(model, tuned, [Task("t", batches_of(1))], base=base, heads=["head"])
    with pytest.raises(RecipeError, match="'haed' is no parameter's or module's name"):
        adamerging(model, tuned, [Task("t", batches_of(1))], base=base, heads=["haed"])


# ---------------------------------------------------------------- bad input


def fit_toy(tasks, **options):
    model, base, tuned = toy_family(2)
    try:
        return adamerging(model, tuned, tasks, base=base, **{"steps": 3, **options})
    finally:
        fit_toy.model, fit_toy.base = model, base


def test_a_loss_that_is_not_finite_stops_with_its_step_and_leaves_the_base():
    good = batches_of(1)[0]
    tasks = [Task("fine", [good]), Task("broken", [good, good, torch.full_like(good, math.nan)])]
    with pytest.raises(PetaFastError, match=r"task 'broken': its loss is nan in step 3 of 9"):
        fit_toy(tasks, steps=9)
    for name, tensor in fit_toy.model.state_dict().items():
        assert torch.equal(tensor, fit_toy.base[name])
    assert all(p.grad is None and p.requires_grad for p in fit_toy.model.parameters())


def test_a_gradient_that_is_not_finite_stops_too():
    forward = lambda model, batch: torch.sqrt(model(batch).clamp(min=0) * 0)  # noqa: E731  the root of 0 has slope inf
    with pytest.raises(PetaFastError, match="gradient is not finite in step 1 of 3"):
        fit_toy([Task("t", batches_of(1), forward)])


def test_labels_are_asked_for_where_they_are_needed():
    with pytest.raises(CompatibilityError, match=r"task 't': loss 'cross_entropy' needs labels.*Tensor \[6, 5\]"):
        fit_toy([Task("t", batches_of(1))], loss="cross_entropy")
    with pytest.raises(CompatibilityError, match="needs labels, got batches without: a mapping of x"):
        fit_toy([Task("t", [{"x": batches_of(1)[0]}])], loss="cross_entropy")
    labelled = [(x, torch.zeros(6, dtype=torch.int64)) for x in batches_of(3)]
    fitted = fit_toy([Task("t", labelled)], loss="cross_entropy", learning_rate=0.1, steps=9)
    assert fitted.history[-3].loss < fitted.history[0].loss


def test_a_generator_serves_once_and_nothing_serves_never():
    assert len(fit_toy([Task("t", (b for b in batches_of(3)))]).history) == 3
    with pytest.raises(CompatibilityError, match="come to an end"):
        fit_toy([Task("t", (b for b in batches_of(2)))])
    with pytest.raises(CompatibilityError, match="come to an end"):
        fit_toy([Task("t", [])])
    stream = endless(Task("t", lambda: iter([1, 2])))
    assert [next(stream) for _ in range(5)] == [1, 2, 1, 2, 1]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"granularity": "channel"}, "granularity: expected one of task, layer"),
        ({"loss": "mse"}, "loss: expected one of entropy, cross_entropy"),
        ({"initial": [0.1, 0.2, 0.3]}, "initial: expected one finite number or 2"),
        ({"initial": math.nan}, "initial: expected one finite number"),
        ({"learning_rate": 0.0}, "learning_rate: expected a positive number"),
        ({"steps": -1}, "steps: expected a number of steps"),
        ({"density": 0.0}, "density: expected a fraction"),
        ({"heads": "head"}, "heads: expected a list"),
    ],
    ids=lambda v: "" if isinstance(v, str) else next(iter(v)),
)
def test_settings_are_checked(options, message):
    with pytest.raises(RecipeError, match=message):
        fit_toy([Task("t", batches_of(1))], **options)


def test_models_are_checked():
    model, base, tuned = toy_family(2)
    tasks = [Task("t", batches_of(1))]
    with pytest.raises(RecipeError, match="models: expected at least one"):
        adamerging(model, [], tasks, base=base)
    with pytest.raises(RecipeError, match="tasks: expected at least one"):
        adamerging(model, tuned, [], base=base)
    with pytest.raises(CompatibilityError, match=r"models\[1\]: lacks 'body.weight'; 0 more"):
        adamerging(model, [tuned[0], {k: v for k, v in tuned[1].items() if k != "body.weight"}], tasks, base=base)
    with pytest.raises(CompatibilityError, match="models: none of them differs from the base"):
        adamerging(model, [base, base], tasks, base=base)
    bad = {**tuned[1], "body.weight": torch.full_like(tuned[1]["body.weight"], math.inf)}
    with pytest.raises(CheckpointError, match=r"models\[1\]: 'body.weight' is not finite"):
        adamerging(model, [tuned[0], bad], tasks, base=base)
    with pytest.raises(CompatibilityError, match=r"expected logits \[rows, classes\], got torch.float32 \[\]"):
        adamerging(model, tuned, [Task("t", batches_of(1), lambda m, b: m(b).sum())], base=base)


# ---------------------------------------------------------------- a model as people have them


def test_modes_and_switches_are_as_before_and_the_base_may_be_the_model_itself():
    model, base, tuned = toy_family(2)
    model.load_state_dict(base)
    model.train()
    model.body.weight.requires_grad_(False)
    fitted = adamerging(model, tuned, [Task("t", batches_of(2))], steps=2, learning_rate=0.1)
    assert model.training and not model.body.weight.requires_grad and model.head.weight.requires_grad
    assert "body.weight" in fitted.coefficients
    again = merge_state_dicts(base, tuned, method="task_arithmetic", weight=fitted.weights())
    assert all(torch.equal(t, again[n]) for n, t in model.state_dict().items())


def test_tied_unchanged_and_16_bit_tensors():
    model, base, tuned = toy_family(2)
    model = model.bfloat16()
    tuned = [{n: t.bfloat16() for n, t in state.items()} for state in tuned]
    base = {n: t.bfloat16() for n, t in base.items()}
    model.twin = nn.Linear(5, 8)
    model.twin.weight = model.body.weight
    for state in (base, *tuned):
        state["head.bias"] = base["head.bias"]
        state |= {"twin.weight": state["body.weight"], "twin.bias": torch.zeros(8, dtype=torch.bfloat16)}
    tasks = [Task("t", [b.bfloat16() for b in batches_of(2)])]
    fitted = adamerging(model, tuned, tasks, base=base, steps=2, learning_rate=0.1)
    assert set(fitted.coefficients) == {"body.weight", "body.bias", "head.weight"}
    assert model.twin.weight is model.body.weight and model.body.weight.dtype == torch.bfloat16
    assert torch.isfinite(model.body.weight).all()


def test_running_statistics_are_averaged():
    class Normed(Toy):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(5)

        def forward(self, x):
            return super().forward(self.norm(x))

    model = Normed()
    base = {n: t.clone() for n, t in model.state_dict().items()}
    tuned = [{**base, "norm.running_mean": torch.full((5,), float(t)), "body.weight": base["body.weight"] + t + 1}
             for t in range(2)]  # fmt: skip
    adamerging(model, tuned, [Task("t", batches_of(1))], base=base, steps=1)
    assert model.norm.running_mean.tolist() == [0.5] * 5
    assert model.norm.num_batches_tracked.item() == base["norm.num_batches_tracked"].item()


def test_batches_and_answers_come_in_many_forms():
    from types import SimpleNamespace

    model, x = Toy(), batches_of(1)[0]
    expected, labels = model(x), torch.zeros(6, dtype=torch.int64)

    class Wrapped(nn.Module):
        def __init__(self, wrap):
            super().__init__()
            self.wrap = wrap

        def forward(self, x):
            return self.wrap(model(x))

    for wrap in (lambda y: y, lambda y: SimpleNamespace(logits=y), lambda y: {"logits": y}, lambda y: (y, None)):
        for batch in (x, [x, labels], (x,), {"x": x, "labels": labels}):
            assert torch.equal(logits_of(Task("t", [batch]), Wrapped(wrap), batch), expected)
