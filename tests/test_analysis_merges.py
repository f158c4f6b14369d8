"""Disentanglement error, landscape, linearization error, score and coefficient curves, where the truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from small_models import tokens, transformer
from torch import nn

import peta_fast as pf
from peta_fast import analysis
from peta_fast.errors import RecipeError

BASE = {"w": torch.tensor([1.0, 1.0])}
APART = [{"w": torch.tensor([-1.0, 1.0])}, {"w": torch.tensor([1.0, -1.0])}]
"""Each task moves the one weight that its own data see."""
ACROSS = [{"w": torch.tensor([0.0, -0.5])}, {"w": torch.tensor([0.0, 0.0])}]
GRID = np.linspace(-2, 2, 9)
AXES = {"one": torch.tensor([[1.0, 0.0]]), "two": torch.tensor([[0.0, 1.0]])}
NAMES = list(AXES)


def sign_on_own_axis(state, task):
    """Labels of f(x) = [w . x > 0.1] on the task's data."""
    return (AXES[task] @ state["w"] > 0.1).long()


def test_steps_of_disjoint_support_do_not_disturb_each_other():
    found = analysis.disentanglement_error(BASE, APART, sign_on_own_axis, names=NAMES)
    assert found.coefficients.tolist() == pytest.approx(np.linspace(-2, 2, 21).tolist())
    assert (found.error == 0).all()


def test_the_error_is_that_of_the_closed_form():
    """w at (l1, l2) is [1 - l1 - l2, 1 - 1.5 l1 - l2]; task one sees its first entry, task two its second."""
    found = analysis.disentanglement_error(BASE, ACROSS, sign_on_own_axis, names=NAMES, coefficients=GRID)
    l1, l2 = np.meshgrid(GRID, GRID, indexing="ij")
    one = ((1 - l1) > 0.1) != ((1 - l1 - l2) > 0.1)
    two = ((1 - l2) > 0.1) != ((1 - 1.5 * l1 - l2) > 0.1)
    np.testing.assert_array_equal(found.parts, np.stack([one, two]))
    np.testing.assert_array_equal(found.error, one.astype(int) + two)
    assert 0 < found.error.mean() and found.error.max() == 2 and found.error[4, 4] == 0
    assert (found.parts[0][:, 4] == 0).all() and (found.parts[1][4] == 0).all()


def test_it_is_symmetric_in_the_tasks_and_zero_without_a_second_step():
    swapped = analysis.disentanglement_error(BASE, ACROSS[::-1], sign_on_own_axis, names=NAMES[::-1], coefficients=GRID)
    found = analysis.disentanglement_error(BASE, ACROSS, sign_on_own_axis, names=NAMES, coefficients=GRID)
    np.testing.assert_array_equal(swapped.error, found.error.T)
    still = analysis.disentanglement_error(BASE, [ACROSS[0], BASE], sign_on_own_axis, names=NAMES, coefficients=GRID)
    assert (still.parts[0] == 0).all()


@pytest.mark.parametrize("points, zeros", [(9, 1), (4, 0)])
def test_single_models_run_once_and_count_for_the_axes(points, zeros):
    calls = {name: 0 for name in NAMES}

    def counting(state, task):
        calls[task] += 1
        return sign_on_own_axis(state, task)

    grid = np.linspace(-2, 2, points)
    told = []
    found = analysis.disentanglement_error(
        BASE, ACROSS, counting, names=NAMES, coefficients=grid, tell=lambda done, total: told.append((done, total))
    )
    expected = points + points * (points - zeros)
    assert calls == {"one": expected, "two": expected} and found.runs == 2 * expected
    assert told[-1] == (2 * expected, 2 * expected)


def test_features_are_compared_by_symmetric_divergence():
    """Features [0, w_t]: p = sigmoid(w_t), and 1/2 [KL(p|q) + KL(q|p)] = (p - q)(a - b) / 2 for a binary softmax."""

    def features(state, task):
        own = state["w"][NAMES.index(task)]
        return torch.stack([torch.zeros(()), own])[None].double()

    grid = [-1.0, 0.0, 0.5]
    found = analysis.disentanglement_error(
        BASE, ACROSS, features, names=NAMES, coefficients=grid, distance="symmetric-kl"
    )
    for i, l1 in enumerate(grid):
        for j, l2 in enumerate(grid):
            pairs = ((1 - l1, 1 - l1 - l2), (1 - l2, 1 - 1.5 * l1 - l2))
            expected = [(1 / (1 + math.exp(-a)) - 1 / (1 + math.exp(-b))) * (a - b) / 2 for a, b in pairs]
            np.testing.assert_allclose(found.parts[:, i, j], expected, atol=1e-7)


@pytest.mark.parametrize("kind", ["logits", "texts", "array"])
def test_predictions_may_be_labels_logits_or_texts(kind):
    def predict(state, task):
        label = sign_on_own_axis(state, task)
        if kind == "logits":
            return torch.nn.functional.one_hot(label, 2).float()
        return [str(v.item()) for v in label] if kind == "texts" else label.numpy()

    found = analysis.disentanglement_error(BASE, ACROSS, predict, names=NAMES, coefficients=GRID)
    plain = analysis.disentanglement_error(BASE, ACROSS, sign_on_own_axis, names=NAMES, coefficients=GRID)
    np.testing.assert_array_equal(found.error, plain.error)


def test_predictions_that_cannot_be_compared_are_refused():
    def refused(predict, said, **options):
        with pytest.raises(RecipeError, match=said):
            analysis.disentanglement_error(BASE, ACROSS, predict, names=NAMES, coefficients=[0.0, 1.0], **options)

    sizes = iter(range(1, 99))
    refused(lambda state, task: torch.zeros(next(sizes)), "one: predictions are")
    refused(lambda state, task: torch.tensor([float("nan")]), "one: predictions are not finite")
    refused(lambda state, task: torch.tensor(1), "one prediction an example")
    refused(lambda state, task: None, "one prediction an example")
    refused(sign_on_own_axis, "expected features", distance="symmetric-kl")
    refused(sign_on_own_axis, "expected one of disagreement", distance="kl")
    with pytest.raises(RecipeError, match="rising numbers"):
        analysis.disentanglement_error(BASE, ACROSS, sign_on_own_axis, names=NAMES, coefficients=[1.0, 0.0])
    with pytest.raises(RecipeError, match="expected two models, got 1"):
        analysis.disentanglement_error(BASE, ACROSS[:1], sign_on_own_axis)


def squared_distance(state, task):
    """Smallest at the task's own fine-tune."""
    return 0.5 * (state["w"] - ACROSS[NAMES.index(task)]["w"]).double().square().sum()


def test_the_landscape_is_spanned_by_the_two_task_vectors_from_the_base():
    found = analysis.loss_landscape(BASE, ACROSS, squared_distance, names=NAMES, coefficients=[-0.5, 0, 0.5, 1])
    a, b = ((m["w"] - BASE["w"]).double().numpy() for m in ACROSS)
    for i, l1 in enumerate(found.coefficients):
        for j, l2 in enumerate(found.coefficients):
            moved = l1 * a + l2 * b
            expected = [0.5 * ((moved - a) ** 2).sum(), 0.5 * ((moved - b) ** 2).sum()]
            np.testing.assert_allclose(found.parts[:, i, j], expected, atol=1e-6)
    assert found.parts[0, 3, 1] == 0 and found.parts[1, 1, 3] == 0, "the fine-tunes lie at (1, 0) and (0, 1)"
    assert found.lowest == (0.5, 0.5) and found.loss[1, 1] == pytest.approx(0.5 * (a @ a + b @ b))
    wide = analysis.loss_landscape(BASE, ACROSS, lambda s, t: 1.0, names=NAMES)
    assert wide.loss.shape == (21, 21) and (wide.coefficients[0], wide.coefficients[-1]) == (-0.5, 1.5)


def test_a_loss_that_is_no_number_is_named_with_its_place():
    with pytest.raises(RecipeError, match=r"one: loss at \(0, 0\): expected a finite number, got nan"):
        analysis.loss_landscape(BASE, ACROSS, lambda s, t: float("nan"), names=NAMES, coefficients=[0, 1])
    with pytest.raises(RecipeError, match="expected a number, got None"):
        analysis.loss_landscape(BASE, ACROSS, lambda s, t: None, names=NAMES, coefficients=[0, 1])


class Product(nn.Module):
    """x -> theta1 theta2 x"""

    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.tensor(v).double()) for v in (2.0, 3.0))

    def forward(self, x):
        return self.first * self.second * x


def test_the_linearization_error_of_the_worked_example():
    """f = 6.72, f_lin = 6.8, f(theta0) = 6; J tau is .8 at the base, 2.8 (.4) + 2.4 (-.2) = .64 at the fine-tune."""
    tuned = {"first": torch.tensor(2.4).double(), "second": torch.tensor(2.8).double()}
    model, x = Product(), torch.tensor([1.0, -3.0]).double()
    found = analysis.linearization_error(model, [tuned], [x], names=["task"]).models["task"]
    assert found.error == pytest.approx(0.08 / 0.72) and found.feature_change == pytest.approx(0.16 / 0.8)
    assert found.plain_accuracy is None and model.first.item() == 2.0 and model.first.requires_grad


def test_a_linear_model_has_no_linearization_error_and_a_deep_one_has():
    torch.manual_seed(0)
    flat = nn.Linear(3, 2).double()
    tuned = {n: t + torch.randn_like(t) for n, t in flat.state_dict().items()}
    x = torch.randn(5, 3).double()
    labels = [flat(x).argmax(-1)]
    found = analysis.linearization_error(flat, [tuned], [x], labels=labels).models["model 0"]
    assert found.error < 1e-12 and found.feature_change < 1e-12
    assert found.base_accuracy == 1 and found.plain_accuracy == found.linear_accuracy
    deep = transformer()
    states = [{n: t + s * torch.randn_like(t) for n, t in deep.state_dict().items()} for s in (0.01, 0.3)]
    small, large = analysis.linearization_error(deep, states, [tokens(), tokens()]).models.values()
    assert 1e-4 < small.error < 0.2 * large.error and small.feature_change < large.feature_change
    tangent = pf.TangentModel(transformer(), states[1])
    plain = transformer()
    plain.load_state_dict(states[1])
    expected = (plain(tokens()) - tangent(tokens())).norm() / (plain(tokens()) - transformer()(tokens())).norm()
    assert large.error == pytest.approx(expected.item(), rel=1e-9)


def test_models_that_cannot_be_compared_are_refused():
    model, x = Product(), torch.ones(2).double()
    with pytest.raises(RecipeError, match="got 1 models, 2 inputs"):
        analysis.linearization_error(model, [{}], [x, x])
    with pytest.raises(RecipeError, match="does the same as the base"):
        analysis.linearization_error(model, [model.state_dict()], [x])


def scores_by_distance(state, parameters):
    """1 at the task's own fine-tune, less with the squared distance from it."""
    return {n: 1 - 0.25 * float((state["w"] - m["w"]).square().sum()) for n, m in zip(NAMES, ACROSS, strict=True)}


def test_lambda_curves_score_every_coefficient_and_name_the_best():
    seen = []

    def evaluate(state, parameters):
        seen.append((parameters["weight"], parameters["models"], parameters["method"]))
        return scores_by_distance(state, parameters)

    found = analysis.lambda_curves(BASE, ACROSS, evaluate, names=NAMES, coefficients=[0, 0.25, 0.5, 1])
    assert seen == [(w, NAMES, "task_arithmetic") for w in (0, 0.25, 0.5, 1)]
    total = np.array([-2.0, -2.5])
    for value, row in zip(found.coefficients, found.scores, strict=True):
        w = 1 + value * total
        assert row.tolist() == pytest.approx([1 - 0.25 * ((w - m["w"].numpy()) ** 2).sum() for m in ACROSS], abs=1e-6)
    assert found.best == 0.5
    single = analysis.lambda_curves(BASE, ACROSS, lambda s, p: 0.3, coefficients=[0, 1])
    assert single.tasks == ("score",) and single.best == 0


THREE = [{"w": torch.tensor(v)} for v in ([2.0, 1.0, 1.0], [1.0, 2.0, 1.0], [1.0, 1.0, 2.0])]
THREE_BASE = {"w": torch.ones(3)}
THREE_NAMES = ["a", "b", "c"]


def score_of_own_weight(state, parameters):
    """The base has 1 of 2 in each task, a task's full step 2, and steps of others do not matter."""
    return dict(zip(THREE_NAMES, state["w"].tolist(), strict=True))


def test_score_curves_normalize_by_the_fine_tunes_and_average_over_all_tasks():
    methods = {"task_arithmetic": {"weight": [0.0, 0.5, 1.0]}, "average": {"weight": "1/T"}}
    told = []
    found = analysis.score_curves(THREE_BASE, THREE, score_of_own_weight, names=THREE_NAMES, methods=methods,
                                  tell=lambda done, total: told.append((done, total)))  # fmt: skip
    assert found.own == {"a": 2, "b": 2, "c": 2} and found.floor == 0.5
    assert len(found.merges) == 2 * 4 and told[-1] == (16, 16)
    assert found.by_number("task_arithmetic") == {2: (pytest.approx(2.5 / 3), 0), 3: (pytest.approx(1), 0)}
    average = found.by_number("average")
    assert average[2][0] == pytest.approx((0.75 + 0.75 + 0.5) / 3) and average[3][0] == pytest.approx(4 / 6)
    pair = next(m for m in found.merges if m.chosen == ("a", "c") and m.method == "task_arithmetic")
    assert pair.parameters == {"weight": 1.0} and pair.scores == {"a": 2, "b": 1, "c": 2}
    assert pair.absolute == pytest.approx(5 / 3)


def test_other_methods_are_merged_by_their_own_keys():
    methods = {"ties at 1": {"method": "ties", "weight": 1.0, "density": [0.5, 1.0]}}
    found = analysis.score_curves(THREE_BASE, THREE, score_of_own_weight, names=THREE_NAMES, methods=methods)
    assert all(m.normalized == pytest.approx({2: 2.5 / 3, 3: 1}[len(m.chosen)]) for m in found.merges)


def test_scores_that_cannot_be_normalized_are_refused():
    def curves(evaluate, **options):
        return analysis.score_curves(THREE_BASE, THREE, evaluate, names=THREE_NAMES, **options)

    with pytest.raises(RecipeError, match="a: its own score is 0, nothing to normalize by"):
        curves(lambda s, p: dict.fromkeys(THREE_NAMES, 0.0))
    with pytest.raises(RecipeError, match="expected a score for each of a"):
        curves(lambda s, p: {"b": 1.0})
    with pytest.raises(RecipeError, match="got inf"):
        curves(lambda s, p: dict.fromkeys(THREE_NAMES, math.inf))
    with pytest.raises(RecipeError, match="would make 88 merges"):
        curves(score_of_own_weight, most=10)
    with pytest.raises(RecipeError, match="two models or more"):
        analysis.score_curves(THREE_BASE, THREE[:1], score_of_own_weight)
    with pytest.raises(RecipeError, match="empty list"):
        curves(score_of_own_weight, methods={"ties": {"weight": []}})


def test_the_addition_rule_takes_the_smallest_of_equals():
    assert analysis.choose_addition([(0.0, 0.1), (0.3, 0.7), (0.6, 0.7), (0.9, 0.2)]) == 0.3
    with pytest.raises(RecipeError, match="got none"):
        analysis.choose_addition([])


def test_the_negation_rule_keeps_95_percent_of_the_control_task():
    points = [(0.0, 0.9, 0.80), (0.2, 0.5, 0.79), (0.4, 0.3, 0.76), (0.6, 0.3, 0.76), (0.8, 0.1, 0.75)]
    assert analysis.choose_negation(points, 0.80) == 0.4
    assert analysis.choose_negation(points, 0.80, threshold=0.9) == 0.8
    assert analysis.choose_negation(points[4:], 0.80) is None


def test_negation_goes_against_the_task_vector_as_far_as_the_control_task_allows():
    """Target w_0, control 1 - (1 - w_1)^2 at w = 1 - l tau, tau = [1, .5]: control falls below .95 at l > .447."""
    base, model = {"w": torch.ones(2)}, {"w": torch.tensor([2.0, 1.5])}
    found = analysis.negate(base, model, lambda s: s["w"][0], lambda s: 1 - (1 - s["w"][1]) ** 2)
    assert found.coefficient == pytest.approx(0.4) and found.base_control == 1
    np.testing.assert_allclose(found.target, 1 - found.coefficients, atol=1e-6)
    nothing = analysis.negate(base, model, lambda s: s["w"][0], lambda s: s["w"][1], coefficients=[0.5, 1.0])
    assert nothing.coefficient == 0 and nothing.coefficients.tolist() == [0, 0.5, 1]
    with pytest.raises(RecipeError, match="coefficients from 0 on"):
        analysis.negate(base, model, float, float, coefficients=[-1.0, 0.0])
    merged = pf.merge_state_dicts(base, [model], method="task_arithmetic", weight=-found.coefficient)
    torch.testing.assert_close(merged["w"], torch.tensor([0.6, 0.8]))
