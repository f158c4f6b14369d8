"""fisher, regmean, regmean_pp and mats: worked examples, dense solutions, and what they do with every tensor."""

from __future__ import annotations

import pytest
import torch
from model_folders import load
from solved_families import (
    FISHERS,
    GRAMS,
    OUTPUTS,
    PAIR,
    PAIR_STATISTICS,
    SHAPES,
    VECTORS,
    W1,
    W2,
    Described,
    dense,
    full,
    models,
    packed_gram,
    save_all,
    statistics,
)

import peta_fast as pf
from peta_fast import methods
from peta_fast._engine import Engine
from peta_fast.methods import TensorSpec
from peta_fast.methods.regmean_pp import collected_as
from peta_fast.ops import spd_solve

AVERAGE = (W1 + W2) / 2
KFAC = torch.tensor([[2.705587, 0.594751], [0.173427, 0.744800]])
REGMEAN = {
    1.0: [[2.538462, 0.615385], [0.653846, 0.211538]],
    0.9: [[2.523124, 0.632297], [0.659212, 0.214177]],
    0.0: [[2.428571, 0.75], [0.714286, 0.25]],
}
OPERATORS = ("identity", "diagonal", "regmean", "kfac")


def merge(states, collected, method="mats", base=None, **options):
    return pf.merge_state_dicts(base, states, method=method, statistics=collected, **options)


def mean(states, name):
    return sum(s[name].double() for s in states).div(len(states)).float()


@pytest.mark.parametrize("off_diagonal", REGMEAN)
@pytest.mark.parametrize("method", ["regmean", "mats-auto", "mats-cg"])
def test_regmean_by_hand(method, off_diagonal):
    options = {"method": "regmean"}
    if method != "regmean":
        options = {"operator": "regmean", "solver": method[5:], "tolerance": 1e-9}
    merged = merge(PAIR, PAIR_STATISTICS, off_diagonal=off_diagonal, **options)
    torch.testing.assert_close(merged["a.weight"], torch.tensor(REGMEAN[off_diagonal]), rtol=0, atol=1e-6)
    assert torch.equal(merged["a.bias"], torch.tensor([0.5, 0.5]))


def test_kfac_by_hand_and_its_residuals_are_reported():
    notes: dict = {}
    merged = merge(PAIR, PAIR_STATISTICS, preconditioner="none", tolerance=1e-9, notes=notes)
    torch.testing.assert_close(merged["a.weight"], KFAC, rtol=0, atol=1e-6)
    found = notes.pop("a.weight")
    absolute = [r * found["norm"] for r in found["residuals"]]
    assert absolute == pytest.approx([1.073233, 0.464159, 0.163401, 0.038266, 0], abs=1e-6)
    assert (found["converged"], found["iterations"], notes) == (True, 4, {})


@pytest.mark.parametrize(
    "compat, expected",
    [("native", [1.4, 2, 2.5]), ("mats", [1.4, 2, 2]), ("fusion_bench", [2.0, 2.6, 2.6])],
)
def test_fisher_by_hand(compat, expected):
    collected = [Described(f, fisher_norm=n) for f, n in zip(FISHERS, ("4", "1"), strict=True)]
    merged = merge(VECTORS, collected, method="fisher", compat=compat)
    torch.testing.assert_close(merged["v"], torch.tensor(expected), rtol=0, atol=1e-5)


def test_the_diagonal_of_mats_is_fisher_merging_and_its_iterations_keep_the_start():
    closed = merge(VECTORS, FISHERS, operator="diagonal")
    assert torch.equal(closed["v"], merge(VECTORS, FISHERS, method="fisher")["v"])
    start = {"v": torch.tensor([7.0, 7, 7])}
    iterated = merge(VECTORS, FISHERS, operator="diagonal", solver="cg", init=start)
    torch.testing.assert_close(iterated["v"], torch.tensor([1.4, 7, 2.5]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("off_diagonal", [1.0, 0.7])
@pytest.mark.parametrize("preconditioner", ["eigen", "diagonal", "none"])
def test_kfac_of_three_tasks_is_the_dense_solution(preconditioner, off_diagonal):
    states, collected = models(), statistics()
    options = {"preconditioner": preconditioner, "off_diagonal": off_diagonal}
    merged = merge(states, collected, tolerance=1e-9, iterations=500, **options)
    for layer in ("layers.0.fc", "lm_head"):
        parts = [[s[f"{layer}.{kind}"] for s in collected] for kind in ("input_gram", "output_gram")]
        exact = dense([s[f"{layer}.weight"] for s in states], *parts, factor=off_diagonal)
        torch.testing.assert_close(merged[f"{layer}.weight"].double(), exact, rtol=0, atol=2e-6)
    for name in ("embed.weight", "layers.0.fc.bias"):
        torch.testing.assert_close(merged[name], mean(states, name), rtol=0, atol=1e-6)


@pytest.mark.parametrize("weight", [[1, 1, 1], [0.5, 2, 1], [0, 1, 3]])
def test_weights_multiply_each_task_s_curvature(weight):
    states, collected = models(), statistics()
    name = "layers.0.fc"
    weights, grams = ([s[f"{name}.{k}"] for s in p] for p, k in ((states, "weight"), (collected, "input_gram")))
    exact = dense(weights, [g * w for g, w in zip(grams, weight, strict=True)])
    merged = merge(states, collected, method="regmean", weight=weight, off_diagonal=1.0)
    torch.testing.assert_close(merged[f"{name}.weight"].double(), exact, rtol=0, atol=1e-5)
    bias = sum(w * s[f"{name}.bias"].double() for w, s in zip(weight, states, strict=True)) / sum(weight)
    torch.testing.assert_close(merged[f"{name}.bias"].double(), bias, rtol=0, atol=1e-6)


@pytest.mark.parametrize("solver", ["auto", "cg"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_equal_models_stay_what_they_are(operator, solver):
    one = models(1)[0]
    merged = merge([one] * 3, statistics(), operator=operator, solver=solver)
    for name, tensor in one.items():
        torch.testing.assert_close(merged[name], tensor, rtol=0, atol=1e-6)


def test_kfac_with_multiples_of_one_as_outputs_is_weighted_regmean():
    states, collected, factors = models(), statistics(), [0.5, 2.0, 1.0]
    for found, factor in zip(collected, factors, strict=True):
        for layer in ("layers.0.fc", "lm_head"):
            packed = found[f"{layer}.output_gram"]
            side = len(full(packed))
            found[f"{layer}.output_gram"] = (factor * torch.eye(side))[torch.triu_indices(side, side).unbind()]
    by_kfac = merge(states, collected, tolerance=1e-9, iterations=300)
    by_regmean = merge(states, collected, method="regmean", weight=factors, off_diagonal=1.0)
    torch.testing.assert_close(by_kfac["lm_head.weight"], by_regmean["lm_head.weight"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("operator", ["regmean", "kfac"])
def test_no_curvature_at_all_is_the_average(operator):
    states, collected = models(), statistics()
    for found in collected:
        for key, packed in found.items():
            if key.endswith("_gram"):
                side = len(full(packed))
                found[key] = torch.eye(side)[torch.triu_indices(side, side).unbind()]
    merged = merge(states, collected, operator=operator)
    for name in SHAPES:
        torch.testing.assert_close(merged[name], mean(states, name), rtol=0, atol=1e-6)


def test_regmean_of_diagonals_alone_weighs_each_input():
    states, collected = models(), statistics()
    merged = merge(states, collected, method="regmean", off_diagonal=0.0)
    diagonals = [full(s["lm_head.input_gram"]).diagonal() for s in collected]
    above = sum(s["lm_head.weight"].double().numpy() * d for s, d in zip(states, diagonals, strict=True))
    exact = torch.from_numpy(above / sum(diagonals))
    torch.testing.assert_close(merged["lm_head.weight"].double(), exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["fisher", "regmean", "mats"])
@pytest.mark.parametrize("factor", [2.0**-20, 2.0**20])
def test_one_factor_common_to_all_statistics_changes_nothing(method, factor):
    """Not so with an absolute tolerance, or a floor under the Fisher."""
    states, collected = models(), statistics()
    larger = [{k: t * factor for k, t in s.items()} for s in collected]
    plain, other = merge(states, collected, method=method), merge(states, larger, method=method)
    for name in SHAPES:
        torch.testing.assert_close(other[name], plain[name], rtol=0, atol=1e-6)


def test_the_absolute_test_of_the_reference_code_stops_small_systems_at_the_start():
    small = [{k: t * 1e-6 for k, t in s.items()} for s in PAIR_STATISTICS]
    options = {"init": {"a.weight": AVERAGE + 1, "a.bias": AVERAGE[0]}}
    kept = merge(PAIR, small, compat="mats", **options)
    assert torch.equal(kept["a.weight"], AVERAGE + 1)
    moved = merge(PAIR, small, tolerance=1e-9, **options)
    torch.testing.assert_close(moved["a.weight"], KFAC, rtol=0, atol=1e-6)


def test_what_no_task_sees_comes_from_the_start():
    states, collected = models(), statistics()
    for found in collected:
        gram = torch.from_numpy(full(found["lm_head.input_gram"])).float()
        gram[3], gram[:, 3] = 0, 0
        found["lm_head.input_gram"] = gram[torch.triu_indices(5, 5).unbind()]
    base = models(4)[3]
    merged_before = {n: t + 5 for n, t in base.items()}
    starts = {
        "average": mean(states, "lm_head.weight"),
        "zero": torch.zeros(11, 5),
        "pretrained": base["lm_head.weight"],
        "merged": merged_before["lm_head.weight"],
    }
    for name, start in starts.items():
        init = merged_before if name == "merged" else name
        merged = merge(states, collected, base=base, init=init, iterations=300)["lm_head.weight"]
        torch.testing.assert_close(merged[:, 3], start[:, 3], rtol=0, atol=1e-6)
        seen = [0, 1, 2, 4]
        assert (merged[:, seen] - start[:, seen]).abs().max() > 0.1
    average = merge(states, collected, method="regmean")["lm_head.weight"]
    torch.testing.assert_close(average[:, 3], starts["average"][:, 3], rtol=0, atol=1e-6)
    dropped = merge(states, collected, method="regmean", compat="mats")["lm_head.weight"]
    assert torch.equal(dropped[:, 3], torch.zeros(11))


def test_the_reference_code_begins_from_a_base_that_is_not_turned_round():
    """One iteration shows where it began; [out, in] read as [in, out] has other elements in each place."""
    states, collected = models(shapes={"fc.weight": (2, 3)}), statistics(shapes={"fc.weight": (2, 3)}, layers=("fc",))
    base = {"fc.weight": torch.arange(6.0).reshape(2, 3)}
    options = {"base": base, "iterations": 1, "preconditioner": "none"}
    quirk = merge(states, collected, init="pretrained", compat="mats", **options)
    misread = {"fc.weight": base["fc.weight"].reshape(3, 2).T.contiguous()}
    assert torch.equal(quirk["fc.weight"], merge(states, collected, init=misread, **options)["fc.weight"])
    native = merge(states, collected, init="pretrained", **options)
    assert (native["fc.weight"] - quirk["fc.weight"]).abs().max() > 0.1


def test_the_reference_code_leaves_out_lm_head_and_we_do_not():
    states, collected, base = models(), statistics(), models(4)[3]
    options = {"operator": "regmean", "solver": "cg", "base": base}
    quirk = merge(states, collected, compat="mats", **options)
    assert torch.equal(quirk["lm_head.weight"], base["lm_head.weight"])
    assert (merge(states, collected, **options)["lm_head.weight"] - base["lm_head.weight"]).abs().max() > 0.1


def test_a_base_is_no_term():
    """It gives what `init: pretrained` asks for, and is not merged."""
    states, collected = models(), statistics()
    for method in ("fisher", "regmean", "mats"):
        with_base = merge(states, collected, method=method, base={n: t * 100 for n, t in models(4)[3].items()})
        without = merge(states, collected, method=method)
        assert all(torch.equal(with_base[n], without[n]) for n in SHAPES)


def test_layers_that_store_their_weights_turned_round():
    states, collected = models(), statistics()
    turned = [{n: t.T.contiguous() if n == "lm_head.weight" else t for n, t in s.items()} for s in states]
    described = [Described(s, transposed='["lm_head"]') for s in collected]
    for found in described:
        del found["lm_head.weight.fisher"]
    for method in ("regmean", "mats"):
        plain, other = merge(states, collected, method=method), merge(turned, described, method=method)
        torch.testing.assert_close(other["lm_head.weight"].T, plain["lm_head.weight"], rtol=0, atol=1e-6)


def test_convolutions_are_matrices_of_patches():
    shape = (4, 2, 3, 3)
    states = [{"conv.weight": s["conv.weight"].reshape(4, 18)} for s in models(shapes={"conv.weight": shape})]
    collected = statistics(shapes={"conv.weight": (4, 18)}, layers=("conv",))
    for found in collected:
        del found["conv.weight.fisher"]
    flat = merge(states, collected, method="regmean")["conv.weight"]
    whole = [{"conv.weight": s["conv.weight"].reshape(shape)} for s in states]
    assert torch.equal(merge(whole, collected, method="regmean")["conv.weight"], flat.reshape(shape))


@pytest.mark.parametrize("operator", ["block", "kfac"])
@pytest.mark.parametrize("solver", ["auto", "cg"])
def test_ia3_solves_for_each_vector_with_its_whole_fisher(operator, solver):
    shapes = {"k.ia3_l": (7, 1), "ff.ia3_l": (1, 5)}
    states = models(shapes=shapes)
    collected = [
        {f"{n}.fisher_gram": packed_gram(max(s), 9 * t + i) for i, (n, s) in enumerate(shapes.items())}
        for t in range(3)
    ]
    merged = merge(states, collected, operator=operator, solver=solver, tolerance=1e-9)
    for name, shape in shapes.items():
        rows = [s[name].reshape(1, -1) for s in states]
        exact = dense(rows, [c[f"{name}.fisher_gram"] for c in collected]).reshape(shape)
        torch.testing.assert_close(merged[name].double(), exact, rtol=0, atol=1e-5)


def test_bf16_models_round_once():
    states = [{n: t.bfloat16() for n, t in s.items()} for s in models()]
    exact = dense([s["lm_head.weight"] for s in states], [s["lm_head.input_gram"] for s in statistics()])
    merged = merge(states, statistics(), method="regmean", off_diagonal=1.0)["lm_head.weight"]
    assert merged.dtype == torch.bfloat16
    torch.testing.assert_close(merged.double(), exact, rtol=2.0**-8, atol=1e-6)


@pytest.mark.parametrize("method", ["fisher", "regmean", "mats"])
def test_statistics_and_the_start_go_where_the_models_are(method, monkeypatch):
    """To the device "meta", in place of a GPU."""
    asked, seen = set(), []
    of_device = Engine._whole_spec

    def look(base, models, params, tensor):
        parts = [vars(s).values() for s in tensor.statistics] + [[tensor.start]]
        seen.append({x.device.type for part in parts for x in part if isinstance(x, torch.Tensor)})
        return models[0]

    monkeypatch.setattr(Engine, "_whole_spec", lambda self, t, device: asked.add(device) or of_device(self, t, "meta"))
    monkeypatch.setattr(methods.get(method), "merge", look)
    merge(models(), statistics(), method=method, **({"init": models(4)[3]} if method == "mats" else {}))
    assert asked == {"cpu"} and seen and all(found == {"meta"} for found in seen)


@pytest.mark.parametrize("init", ["zero", "average"])
def test_mats_makes_what_it_needs_where_the_models_are(init, monkeypatch):
    made = []
    monkeypatch.setattr(spd_solve, "conjugate_gradients", lambda apply, right, begin, **_: made.append(apply(begin)))
    params = methods.get("mats").Params(weight=(1.0,), statistics=(None,), operator="identity", solver="cg", init=init)
    spec = TensorSpec("w", (3, 2), 1, "native", "tensor", 6)
    with pytest.raises(AttributeError):  # where the result is looked at
        methods.get("mats").merge(None, [torch.empty(3, 2, device="meta")], params, spec)
    assert made[0].device.type == "meta"


@pytest.mark.parametrize("method", ["fisher", "regmean", "mats"])
def test_a_recipe_makes_what_memory_makes(method, tmp_path):
    states, collected = models(), statistics()
    recipe = {"merge_method": method, **save_all(tmp_path, states, collected)}
    report = pf.merge(recipe, tmp_path / "out", max_memory="16MB")
    merged = load(tmp_path / "out")
    in_memory = merge(states, collected, method=method)
    assert all(torch.equal(merged[n], in_memory[n]) for n in SHAPES)
    solved = {"fisher": set(), "regmean": {"layers.0.fc.weight", "lm_head.weight"}}
    assert set(report.notes) == solved.get(method, {"layers.0.fc.weight", "lm_head.weight"})
    assert set(report.to_json()["notes"]) == set(report.notes)


def test_a_recipe_begins_from_a_checkpoint_and_says_what_it_averages(tmp_path):
    states, collected, start = models(), statistics(), models(4)[3]
    listed = save_all(tmp_path, states, collected, base=start)
    recipe = {"merge_method": "mats", "parameters": {"init": str(tmp_path / "base"), "iterations": 1}, **listed}
    plan = pf.make_plan(pf.load_recipe(recipe))
    reasons = {t.name: (t.action, t.reason) for t in plan.tensors}
    assert reasons["lm_head.weight"] == ("merge", "")
    assert reasons["embed.weight"] == ("average", "no input_gram and output_gram or fisher_gram for it")
    pf.merge(recipe, tmp_path / "out")
    in_memory = merge(states, collected, init=start, iterations=1)
    assert torch.equal(load(tmp_path / "out")["lm_head.weight"], in_memory["lm_head.weight"])


def test_layers_of_slices_keep_their_own_statistics(tmp_path):
    shapes = {f"layers.{i}.fc.weight": (4, 5) for i in range(2)}
    states = models(2, shapes)
    collected = statistics(2, shapes, tuple(n.removesuffix(".weight") for n in shapes))
    listed = save_all(tmp_path, states, collected)["models"]
    slices = [{"sources": [{**m, "layer_range": [i, i + 1]} for m in listed]} for i in (1, 0)]
    pf.merge({"merge_method": "regmean", "slices": slices}, tmp_path / "out")
    merged, whole = load(tmp_path / "out"), merge(states, collected, method="regmean")
    assert torch.equal(merged["layers.0.fc.weight"], whole["layers.1.fc.weight"])
    assert torch.equal(merged["layers.1.fc.weight"], whole["layers.0.fc.weight"])


def test_regmean_pp_takes_its_own_statistics_alone():
    plain = statistics()
    collected = [Described(s, collected=collected_as(0.9)) for s in plain]
    merged = merge(models(), collected, method="regmean_pp")
    regmean = merge(models(), plain, method="regmean")
    assert all(torch.equal(merged[n], regmean[n]) for n in SHAPES)
    with pytest.raises(pf.CheckpointError, match="off_diagonal 0.5, got regmean_pp, off_diagonal 0.9"):
        merge(models(), collected, method="regmean_pp", off_diagonal=0.5)
    with pytest.raises(pf.CheckpointError, match="got those of regmean"):
        merge(models(), plain, method="regmean_pp")


def test_the_outputs_of_the_example_are_those_of_kfac():
    exact = dense([W1, W2], GRAMS, OUTPUTS)
    torch.testing.assert_close(exact.float(), KFAC, rtol=0, atol=1e-6)


def test_the_command_line_says_what_was_solved_and_how_well(tmp_path, capsys):
    import yaml
    from command_line import runner

    collected = statistics()
    for t, found in enumerate(collected):
        x = torch.randn(1, 5, generator=torch.Generator().manual_seed(t))
        found["lm_head.input_gram"] = (x.T @ x)[torch.triu_indices(5, 5).unbind()]
    listed = save_all(tmp_path, models(), collected)
    run = runner(capsys)
    for method, parameters in (("regmean", {"off_diagonal": 1.0}), ("mats", {"iterations": 1, "tolerance": 1e-9})):
        (tmp_path / f"{method}.yml").write_text(yaml.safe_dump({"method": method, "parameters": parameters, **listed}))
        code, text, errors = run("merge", tmp_path / f"{method}.yml", tmp_path / method)
        assert code == 0, errors
        expected = {
            "regmean": "solved 2 tensors directly, 1 with a ridge of up to 1e-05: lm_head.weight",
            "mats": "solved 2 tensors by conjugate gradients, 2 not to the tolerance (|r| up to ",
        }
        assert expected[method] in text
