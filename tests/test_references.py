"""The fp64 references against examples worked on paper: who guards the guards."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from philox_reference import keep_mask, philox4x32_10, uniforms
from references import METHODS, Problem, assert_close_to_reference, merge_reference, merge_with_terms, rescale
from torch import Tensor
from trimming_reference import della_probabilities, largest_by_authors, largest_by_count, largest_by_threshold
from worked_examples import EXAMPLES, ONE_ROW, SOFT_MASK, TEN_PARAMETERS


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def merged(tasks, **keywords) -> Tensor:
    """Merges task vectors given as rows, on a base of zeros."""
    models = [{"w": torch.tensor(t, dtype=torch.float64)} for t in tasks]
    base = {"w": torch.zeros(len(tasks[0]), dtype=torch.float64)}
    return merge_reference(base, models, **keywords)["w"]


def assert_equal(actual: Tensor, expected, tolerance: float = 1e-6) -> None:
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("example", EXAMPLES, ids=[e.name for e in EXAMPLES])
def test_worked_example(example):
    result = merge_reference(*example.state_dicts(), **example.keywords)["w"]
    assert_equal(result, example.expected, example.tolerance)


# ---------------------------------------------------------------- linear and task arithmetic


def test_linear_equals_task_arithmetic_with_weights_of_one_over_t():
    base, models = {"w": torch.randn(50)}, [{"w": torch.randn(50)} for _ in range(4)]
    arithmetic = merge_reference(base, models, method="task_arithmetic", weight=1 / 4)["w"]
    assert_equal(arithmetic, merge_reference(None, models, method="linear")["w"])


def test_task_arithmetic_with_scaling_zero_is_the_base_and_with_one_task_the_task():
    base, model = {"w": torch.randn(50)}, {"w": torch.randn(50)}
    assert torch.equal(merge_reference(base, [model], method="task_arithmetic", scaling=0)["w"], base["w"].double())
    assert_equal(merge_reference(base, [model], method="task_arithmetic")["w"], model["w"])


def test_task_arithmetic_is_linear_and_blind_to_the_order_of_tasks():
    once = merged(TEN_PARAMETERS, method="task_arithmetic", weight=[1, 2, 3])
    assert_equal(merged(TEN_PARAMETERS, method="task_arithmetic", weight=[1, 2, 3], scaling=-0.5), -0.5 * once)
    assert_equal(merged(TEN_PARAMETERS[::-1], method="task_arithmetic", weight=[3, 2, 1]), once)


# ---------------------------------------------------------------- TIES


@pytest.mark.parametrize(
    "density, thresholds, counts", [(0.2, [0.7, 0.7, 0.5], [3, 3, 4]), (0.5, [0.4, 0.3, 0.3], [6, 7, 6])]
)
def test_the_authors_threshold_keeps_one_more_and_all_ties(density, thresholds, counts):
    for row, threshold, count in zip(TEN_PARAMETERS, thresholds, counts, strict=True):
        magnitudes = torch.tensor(row).abs()
        kept = largest_by_authors(magnitudes, density, "ties-authors")
        assert int(kept.sum()) == count
        assert magnitudes[kept].min().item() == pytest.approx(threshold)


def test_columns_that_cancel_follow_the_sign_that_fp32_gives_them():
    """-0.9 + 0.6 + 0.3 is negative in fp64, positive in fp32; so the majority, and with it column 2, turns too."""
    half = {"method": "ties", "compat": "ties-authors", "density": 0.5}
    exact = [0.7, 0.3, -1, -0.9, 0, 0, -0.3, -0.45, 0.75, -0.6]
    assert_equal(merged(TEN_PARAMETERS, decisions=torch.float64, **half), exact)
    single = [0.7, 0.3, 0.5, 0.45, 0, 0, -0.3, -0.45, 0.75, -0.6]
    assert_equal(merged(TEN_PARAMETERS, decisions=torch.float32, **half), single)


def test_a_majority_of_zero_is_negative_for_the_authors_and_positive_for_peta():
    half = {"method": "ties", "density": 0.5, "decisions": torch.float64}
    authors = merged(TEN_PARAMETERS, compat="ties-authors", **half)
    peta = merged(TEN_PARAMETERS, compat="peta", **half)
    assert_equal(authors[[2, 7]], [-1, -0.45])
    assert_equal(peta[[2, 7]], [0.5, 0.9])


def test_the_majority_is_counted_over_all_tensors_of_the_model():
    zeros = {"a": torch.zeros(2), "b": torch.zeros(3)}
    models = [
        {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([2.0, 3.0, 4.0])},
        {"a": torch.tensor([-1.0, 0.0]), "b": torch.tensor([2.0, 3.0, -5.0])},
    ]
    result = merge_reference(zeros, models, method="ties", compat="ties-authors", density=0.9)
    assert_equal(result["a"], [1, 0])
    assert_equal(result["b"], [2, 3, -5])


def test_the_authors_refuse_to_keep_everything():
    with pytest.raises(ValueError, match="density below 1"):
        merged(TEN_PARAMETERS, method="ties", compat="ties-authors", density=1)


def test_ties_of_equal_tasks_is_the_trimmed_task():
    for compat in ("native", "mergekit", "peft"):
        assert_equal(merged([[3, -1, 2, 0.5]] * 3, method="ties", compat=compat, density=0.5), [3, 0, 2, 0])


def test_the_disjoint_mean_lies_within_what_agrees_and_scales_with_its_tasks():
    tasks = torch.randn(5, 200, dtype=torch.float64)
    once = merged(tasks.tolist(), method="ties", density=0.3)
    assert (once <= tasks.amax(0).clamp(min=0) + 1e-6).all() and (once >= tasks.amin(0).clamp(max=0) - 1e-6).all()
    assert_equal(merged((4 * tasks).tolist(), method="ties", density=0.3), 4 * once)
    assert_equal(merged((-tasks).tolist(), method="ties", density=0.3), -once)


@pytest.mark.parametrize(
    "density, by_threshold, by_count", [(0, 0, 0), (0.01, 1, 1), (0.29, 2, 2), (0.5, 10, 5), (0.7, 10, 7), (1, 10, 10)]
)
def test_a_threshold_among_equals_keeps_them_all_and_a_count_does_not(density, by_threshold, by_count):
    """Ten magnitudes: 4 3 2 1 and six equal ones below them."""
    magnitudes = torch.tensor([1.0, 0, 0, 2, 0, 3, 0, 4, 0, 0])
    assert int(largest_by_threshold(magnitudes, density, "native").sum()) == by_threshold
    assert int(largest_by_count(magnitudes, density, "mergekit").sum()) == by_count


def test_the_first_of_equal_magnitudes_survive():
    assert largest_by_count(torch.ones(5), 0.4, "mergekit").tolist() == [True, True, False, False, False]


def test_trim_scopes_rank_within_a_tensor_a_block_or_the_model():
    base = {"experts": torch.zeros(2, 1, 2), "bias": torch.zeros(2)}
    model = {"experts": torch.tensor([[[9.0, 8.0]], [[2.0, 1.0]]]), "bias": torch.tensor([1.5, 0.5])}
    survivors = {}
    for scope in ("tensor", "row-block", "model"):
        result = merge_reference(base, [model], method="ties", density=0.5, trim_scope=scope)
        survivors[scope] = [result[name].flatten().tolist() for name in base]
    assert survivors["tensor"] == [[9, 8, 0, 0], [1.5, 0]]
    assert survivors["row-block"] == [[9, 0, 2, 0], [1.5, 0]]
    assert survivors["model"] == [[9, 8, 2, 0], [0, 0]]


# ---------------------------------------------------------------- DARE, DELLA, Breadcrumbs, masks


def test_dare_rescales_by_one_over_p_or_to_the_same_l1_norm():
    delta, kept = torch.tensor([0.2, -0.4, 0.1, 0.3]), torch.tensor([True, False, True, False])
    native, mergekit = (rescale(Problem({}, [], (), compat), delta, kept, 0.5) for compat in ("native", "mergekit"))
    assert_equal((delta * kept).double() * native, [0.4, 0, 0.2, 0])
    assert_equal((delta * kept).double() * mergekit, [0.666667, 0, 0.333333, 0])


def test_dare_keeps_the_mean_over_seeds():
    base, model = {"w": torch.zeros(64)}, {"w": torch.linspace(-1, 1, 64)}
    runs = [merge_reference(base, [model], method="dare_linear", density=0.25, seed=s)["w"] for s in range(400)]
    deviation = (1 / 0.25 - 1) ** 0.5 * model["w"].double().abs() / 400**0.5
    assert ((torch.stack(runs).mean(0) - model["w"]).abs() <= 5 * deviation + 1e-9).all()


def test_della_gives_the_largest_of_a_row_the_best_chance():
    expected = [0.65, 0.383333, 0.516667, 0.483333, 0.35, 0.583333, 0.616667, 0.416667, 0.45, 0.55]
    assert_equal(della_probabilities(torch.tensor(ONE_ROW), 0.5, 0.15), expected)
    rows = torch.tensor([[3.0, 1.0, 2.0], [1.0, 1.0, 1.0]])
    assert_equal(della_probabilities(rows, 0.5, 0.2), [[0.7, 0.3, 0.5], [0.3, 0.5, 0.7]])


def test_della_leaves_rows_of_one_element_at_the_density():
    assert_equal(della_probabilities(torch.tensor([[3.0], [1.0]]), 0.5, 0.2), [[0.5], [0.5]])
    assert_equal(della_probabilities(torch.tensor(3.0), 0.5, 0.2), 0.5)


@pytest.mark.parametrize("density, epsilon", [(0.15, 0.15), (0.9, 0.15), (0.85, 0.15)])
def test_della_refuses_probabilities_outside_the_open_unit_interval(density, epsilon):
    with pytest.raises(ValueError, match="inside"):
        della_probabilities(torch.tensor(ONE_ROW), density, epsilon)


def test_the_soft_mask_of_the_worked_example():
    logit, u = torch.tensor([0.0, 1, -1, 2]).double(), torch.tensor([0.5, 0.3, 0.9, 0.1]).double()
    mask = torch.sigmoid((logit + u.log() - (1 - u).log()) / 0.5)
    assert_equal(mask, SOFT_MASK)
    assert_equal(mask.mean(), 0.598703)
    assert_equal(torch.tensor([1, -2, 0.5, 4]) * mask / mask.mean(), [0.835138, -1.923367, 0.765323, 2.690126])


# ---------------------------------------------------------------- randomness and state dicts


@pytest.mark.parametrize(
    "counter, key, words",
    [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_gives_the_published_known_answers(counter, key, words):
    found = philox4x32_10(np.array(counter, dtype=np.uint64)[:, None], key)
    assert " ".join(f"{w:08x}" for w in found[:, 0]) == words


def test_uniforms_depend_on_seed_position_name_and_place_alone():
    u = uniforms(7, 1, "layer.weight", 1003)
    assert np.array_equal(u[:10], uniforms(7, 1, "layer.weight", 10))
    assert all(
        (u[:50] != uniforms(*k, 50)).any() for k in [(8, 1, "layer.weight"), (7, 0, "layer.weight"), (7, 1, "b")]
    )
    assert u.min() >= 0 and u.max() < 1 and np.array_equal(u * 2**24, np.floor(u * 2**24))


def test_the_kept_fraction_lies_within_five_sigma():
    n, p = 200_000, 0.3
    kept = int(keep_mask(0, 0, "w", torch.full((n,), p)).sum())
    assert abs(kept - n * p) <= 5 * math.sqrt(n * p * (1 - p))


def test_running_statistics_are_averaged_and_integers_copied():
    base = {"bn.running_mean": torch.zeros(2), "bn.num_batches_tracked": torch.tensor(5), "w": torch.zeros(1)}
    models = [{n: v + i for n, v in base.items()} for i in (1, 3)]
    result = merge_reference(base, models, method="task_arithmetic", weight=2)
    assert result["bn.running_mean"].tolist() == [2, 2]
    assert result["bn.num_batches_tracked"].item() == 5 and result["w"].item() == 8


def test_a_compat_mode_that_a_method_lacks_is_refused():
    for method, (_, compats) in METHODS.items():
        with pytest.raises(ValueError, match="compat"):
            merge_reference({}, [{}], method=method, compat="no-such" if "peft" in compats else "peft")


def test_closeness_to_a_reference_means_half_a_last_place():
    exact = merge_with_terms({"w": torch.zeros(3)}, [{"w": torch.tensor([1.0, 1.25, -3.0])}], method="ties")["w"]
    assert_close_to_reference(exact.value.bfloat16(), exact, num_tasks=1)
    with pytest.raises(AssertionError, match="1 of 3 elements"):
        assert_close_to_reference(torch.tensor([1.0, 1.2578125, -3.0]).bfloat16(), exact, num_tasks=1)
