"""Adaptive weight disentanglement: T coefficients against the descent on all elements, and the merge that uses them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import assert_same_bits, bits, family
from model_folders import load, save_family
from torch import Tensor

import peta_fast as pf
from peta_fast.errors import CheckpointError, RecipeError
from peta_fast.ops.weight_disentanglement import disentangle
from peta_fast.plan import make_plan
from peta_fast.recipe import load_recipe

WORKED = torch.tensor([[1, 1, 0], [1, 0, 1], [1, -0.5, 0.5]], dtype=torch.float64)


def loss(tau: Tensor, delta: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """(mean |cos| of the pairs, that + alpha |delta|) as the paper writes it."""
    left = torch.nn.functional.normalize(tau - delta, dim=1)
    overlap = (left @ left.T).triu(1).abs().sum() * 2 / (len(tau) * (len(tau) - 1))
    return overlap, overlap + alpha * torch.linalg.vector_norm(delta)


def plain_descent(tau: Tensor, alpha: float = 0.1, learning_rate: float = 0.01, iterations: int = 300) -> Tensor:
    """delta [N] by autograd over all elements; the norm at 0 counts as flat."""
    delta = torch.zeros_like(tau[0], requires_grad=True)
    for _ in range(iterations):
        overlap, objective = loss(tau, delta, alpha)
        (slope,) = torch.autograd.grad(objective if delta.detach().any() else overlap, delta)
        with torch.no_grad():
            delta -= learning_rate * slope
    return delta.detach()


def random_taus(tasks: int, size: int = 500, common: float = 0.5, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    shared = torch.randn(size, generator=draw, dtype=torch.float64)
    return (torch.randn(tasks, size, generator=draw, dtype=torch.float64) * 0.3 + common * shared) / size**0.5


def as_delta(found, tau: Tensor) -> Tensor:
    return torch.from_numpy(found.coefficients) @ tau


def test_the_worked_example():
    gram = (WORKED @ WORKED.T).numpy()
    found = disentangle(gram)
    assert found.objective[0] == pytest.approx(0.551567, abs=1e-6)
    torch.testing.assert_close(
        as_delta(found, WORKED), torch.tensor([0.2280, 0.1365, 0.3501]).double(), atol=1e-4, rtol=0
    )
    assert found.overlap[-1] == pytest.approx(0.321910, abs=1e-6)
    assert found.objective[-1] == pytest.approx(0.365864, abs=1e-6)
    first = as_delta(disentangle(gram, learning_rate=1, iterations=1), WORKED)
    torch.testing.assert_close(-first, torch.tensor([-0.487417, -0.163521, -0.195596]).double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("tasks", [2, 3, 8])
@pytest.mark.parametrize("alpha, learning_rate", [(0.1, 0.01), (0.0, 0.002), (0.3, 0.004)])
def test_it_is_the_descent_on_all_elements(tasks, alpha, learning_rate):
    tau = random_taus(tasks)
    found = disentangle((tau @ tau.T).numpy(), alpha=alpha, learning_rate=learning_rate)
    exact = plain_descent(tau, alpha, learning_rate)
    assert exact.norm() > 0.02
    torch.testing.assert_close(as_delta(found, tau), exact, rtol=1e-9, atol=1e-11)
    overlap, objective = loss(tau, exact, alpha)
    assert found.overlap[-1] == pytest.approx(overlap.item(), abs=1e-10)
    assert found.objective[-1] == pytest.approx(objective.item(), abs=1e-10)
    assert found.overlap[-1] < found.overlap[0]


def test_vectors_of_a_lower_rank_have_the_same_delta():
    tau = random_taus(3)
    tau = torch.cat([tau, tau[:1] + tau[1:2]])
    found = disentangle((tau @ tau.T).numpy(), iterations=40)
    torch.testing.assert_close(as_delta(found, tau), plain_descent(tau, iterations=40), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "tau",
    [torch.eye(3), torch.zeros(3, 4), torch.tensor([[1.0, 0], [0, 0], [0, 2.0]])],
    ids=["orthogonal", "zero", "one of no length"],
)
def test_where_nothing_overlaps_nothing_is_taken_away(tau):
    found = disentangle((tau @ tau.T).double().numpy())
    assert (found.coefficients == 0).all() and (found.objective == 0).all()


def test_equal_vectors_lose_nothing_by_direction():
    """cos stays 1 whatever is taken away of its own length: the gradient is 0."""
    tau = torch.tensor([[3.0, 4.0], [3.0, 4.0]]).double()
    found = disentangle((tau @ tau.T).numpy(), alpha=0)
    np.testing.assert_allclose(found.coefficients, 0, atol=1e-14)
    np.testing.assert_allclose(found.overlap, 1, atol=1e-14)


@pytest.mark.parametrize("shape", [(4,), (4, 7)], ids=["task-wise", "layer-wise"])
def test_weights_merge_what_is_left_and_their_gradient_goes_back(shape):
    draw, tau = np.random.default_rng(0), random_taus(4).numpy()
    found = disentangle(tau @ tau.T)
    w, g = draw.standard_normal(shape), draw.standard_normal(shape)
    delta = found.coefficients @ tau
    expected = np.tensordot(w.T, tau - delta, 1)
    np.testing.assert_allclose(np.tensordot(found.weights(w).T, tau, 1), expected, atol=1e-12)
    assert (g * found.weights(w)).sum() == pytest.approx((found.pulled_back(g) * w).sum(), rel=1e-12)


@pytest.mark.parametrize(
    "gram, said",
    [
        ([[1.0]], "two task vectors or more"),
        ([[1.0, 0.0]], "two task vectors or more"),
        ([[1, np.nan], [np.nan, 1]], "finite"),
        ([[1, 0.5], [0.4, 1]], "symmetric"),
    ],
)
def test_what_is_no_gram_matrix_is_refused(gram, said):
    with pytest.raises(RecipeError, match=said):
        disentangle(np.array(gram))


def merged_exactly(base, models, weight, scaling=1.0, **settings) -> dict[str, Tensor]:
    """By the plain descent in fp64 over the whole flattened model."""
    names = [n for n in base if base[n].is_floating_point()]
    flat = [torch.cat([(m[n].float() - base[n].float()).double().flatten() for n in names]) for m in models]
    delta = plain_descent(torch.stack(flat), **settings)
    moved = scaling * sum(w * (tau - delta) for w, tau in zip(weight, flat, strict=True))
    pieces = moved.split([base[n].numel() for n in names])
    return {n: base[n].double() + piece.view(base[n].shape) for n, piece in zip(names, pieces, strict=True)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_merge_is_that_of_the_whole_model(dtype):
    base, models = family(3, base_dtype=dtype, model_dtypes=(dtype,))
    base["ids"] = torch.arange(4)
    models = [{**m, "ids": base["ids"]} for m in models]
    settings = {"alpha": 0.2, "learning_rate": 0.1, "iterations": 50}
    actual = pf.merge_state_dicts(base, models, method="awd", weight=[1, 0.5, 0.8], scaling=1.5, **settings)
    exact = merged_exactly(base, models, [1, 0.5, 0.8], 1.5, **settings)
    plain = pf.merge_state_dicts(base, models, method="task_arithmetic", weight=[1, 0.5, 0.8], scaling=1.5)
    assert torch.equal(actual["ids"], base["ids"])
    for name, value in exact.items():
        ulp = torch.finfo(dtype).eps * value.abs().max() if value.numel() else 0
        assert ((actual[name].double() - value).abs() <= ulp).all(), name
    assert any((actual[n].double() - plain[n].double()).abs().max() > 0.01 for n in ("embed.weight", "norm.bias"))


def test_on_disk_it_is_the_merge_in_memory_with_one_reading_more(tmp_path):
    base, models = save_family(tmp_path, 3)
    settings = {"method": "awd", "weight": [0.6, 0.5, 0.4], "lambda": 1.2}
    recipe = {
        "method": "awd", "base_model": str(tmp_path / "base"), "parameters": {"lambda": 1.2},
        "models": [
            {"model": str(tmp_path / n), "parameters": {"weight": w}}
            for n, w in zip("abc", (0.6, 0.5, 0.4), strict=True)
        ],
    }  # fmt: skip
    plan = make_plan(load_recipe(recipe))
    assert plan.bytes_read == 2 * 4 * sum(t.nbytes for t in base.values())
    report = pf.merge(recipe, tmp_path / "out", max_memory="24MB")
    assert report.bytes_read == plan.bytes_read
    assert_same_bits(load(tmp_path / "out"), pf.merge_state_dicts(base, models, **settings))


def test_weights_may_differ_by_layer():
    base, models = family(2)
    by_layer = [{"filter": "embed", "value": 0.9}, {"value": 0.3}]
    recipe = load_recipe({"method": "awd", "base_model": "x", "models": [{"model": "a"}, {"model": "b"}],
                          "parameters": {"weight": by_layer}})  # fmt: skip
    assert recipe.method == "awd"
    whole = {w: pf.merge_state_dicts(base, models, method="awd", weight=w) for w in (0.9, 0.3)}
    assert not torch.equal(bits(whole[0.9]["embed.weight"]), bits(whole[0.3]["embed.weight"]))
    piece = recipe.modules[0].slices[0]
    assert recipe.resolve("embed.weight", recipe.modules[0], piece, None)["weight"] == (0.9, 0.9)
    assert recipe.resolve("norm.bias", recipe.modules[0], piece, None)["weight"] == (0.3, 0.3)


@pytest.mark.parametrize(
    "settings, said",
    [({"weight": -1, "alpha": -0.1}, "alpha"), ({"weight": 1, "iterations": 2.5}, "iterations"), ({}, "weight")],
)
def test_settings_that_make_no_sense_are_refused(settings, said):
    base, models = family(2)
    with pytest.raises(RecipeError, match=said):
        pf.merge_state_dicts(base, models, method="awd", **settings)


def test_one_model_has_nobody_to_be_disentangled_from():
    base, models = family(1)
    with pytest.raises(RecipeError, match="at least 2 models, got 1"):
        pf.merge_state_dicts(base, models, method="awd", weight=1)


@pytest.mark.parametrize("allow", [False, True])
def test_nan_is_named_before_any_merging(allow):
    base, models = family(2)
    models[1]["norm.bias"][7] = float("nan")
    out = {n: torch.full_like(t, 5) for n, t in base.items()}
    with pytest.raises(CheckpointError, match="model 1: 'norm.bias': expected finite values, got 1 NaN"):
        pf.merge_state_dicts(base, models, method="awd", weight=1, allow_nonfinite=allow, out=out)
    assert all((t == 5).all() for t in out.values())


def test_disentangled_models_merge_by_any_method():
    """Task arithmetic of them is `awd`; TIES of them is TIES of tau - delta."""
    base, models = family(3)
    settings = {"alpha": 0.05, "learning_rate": 0.1, "iterations": 60}
    left, found = pf.disentangle_state_dicts(base, models, **settings)
    taus = torch.stack([torch.cat([(m[n] - base[n]).double().flatten() for n in base]) for m in models])
    delta = plain_descent(taus, **settings)
    torch.testing.assert_close(as_delta(found, taus), delta, rtol=1e-6, atol=1e-9)
    assert delta.norm() > 0.1
    for tau, model in zip(taus, left, strict=True):
        moved = torch.cat([(model[n].double() - base[n].double()).flatten() for n in base])
        torch.testing.assert_close(moved, tau - delta, rtol=0, atol=5e-7)
    direct = pf.merge_state_dicts(base, models, method="awd", weight=0.5, **settings)
    summed = pf.merge_state_dicts(base, left, method="task_arithmetic", weight=0.5)
    for name in base:
        torch.testing.assert_close(summed[name], direct[name], rtol=0, atol=1e-6)
    kept = pf.merge_state_dicts(base, left, method="ties", weight=1.0, density=0.3)
    moved = torch.stack([m["embed.weight"] - base["embed.weight"] for m in left])
    k = int(0.3 * moved[0].numel())
    thresholds = moved.flatten(1).abs().sort(dim=1, descending=True).values[:, k - 1]
    trimmed = torch.where(moved.abs() >= thresholds[:, None, None], moved, 0)
    agree = trimmed.sign() == trimmed.sum(0).sign()
    mean = (trimmed * agree).sum(0) / (agree & (trimmed != 0)).sum(0).clamp(min=1)
    torch.testing.assert_close(kept["embed.weight"], base["embed.weight"] + mean, rtol=0, atol=1e-6)


def test_disentangled_models_on_disk_are_those_in_memory(tmp_path):
    base, models = save_family(tmp_path, 2)
    paths = [tmp_path / n for n in "ab"]
    folders, found = pf.disentangle_checkpoints(tmp_path / "base", paths, tmp_path / "left", iterations=20)
    left, again = pf.disentangle_state_dicts(base, models, iterations=20)
    np.testing.assert_array_equal(found.coefficients, again.coefficients)
    for folder, state in zip(folders, left, strict=True):
        assert_same_bits(load(folder), state)
    with pytest.raises(RecipeError, match="two models or more, got 1"):
        pf.disentangle_checkpoints(tmp_path / "base", paths[:1], tmp_path / "other")
    assert not (tmp_path / "other").exists()
