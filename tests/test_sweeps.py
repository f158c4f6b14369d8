"""Sweeps: every point has the bytes of its own merge, in memory, in a live model and on disk; faults are told."""

from __future__ import annotations

import csv
import json
import math
import shutil

import numpy as np
import pytest
import torch
from families import assert_same_bits, coarse_family, family, inputs_of
from model_folders import HIDDEN, VOCAB, files_of, load, save_family, save_model

import peta_fast
from peta_fast import _run_variants, _variant_memory
from peta_fast._grid import Grid, axes_of, read_axes
from peta_fast._sweep_results import JOURNAL
from peta_fast.errors import CheckpointError, CompatibilityError, RecipeError, ResourceError
from peta_fast.journal import verify
from peta_fast.recipe import load_recipe

GRIDS = {
    "ties": ({"density": [0.2, 0.5], "weight": [0.3, 1.0], "scaling": [1, 0.5]}, {}),
    "ties mergekit": ({"density": [0.2, 0.7], "weight": [0.3, 1.0]}, {"compat": "mergekit"}),
    "ties peft": ({"density": [0.2, 0.7], "weight": [0.3, 1.0]}, {"compat": "peft"}),
    "ties ties-authors": ({"density": [0.2, 0.5], "lambda": [0.3, 1.0]}, {"compat": "ties-authors"}),
    "ties native": ({"density": [0.1, 1.0], "trim_scope": ["model", "row-block"]}, {}),
    "dare_ties": ({"density": [0.3, 0.8], "seed": [0, 5]}, {"weight": 0.7}),
    "dare_linear mergekit": ({"density": [0.3, 0.8], "weight": [0.2, 1.0]}, {"compat": "mergekit"}),
    "della": ({"epsilon": [0.05, 0.1], "weight": [0.2, 1.0]}, {"density": 0.4}),
    "breadcrumbs_ties": ({"gamma": [0.05, 0.1], "density": [0.3, 0.6]}, {"weight": 1.0}),
    "task_arithmetic": ({"weight.0": [0.2, 1.0], "weight.1": [-0.5, 0.4]}, {"weight": 0.1}),
    "linear": ({"weight.1": [0.2, 1.0], "normalize": [True, False]}, {"weight": 0.5}),
    "slerp": ({"t": [0.0, 0.3, 1.0]}, {}),
    "passthrough": ({"seed": [1, 2]}, {}),
}


def settings_of(point, settings, models) -> dict:
    """Keywords of the single merge of a point."""
    settings = dict(settings)
    for key, value in point.items():
        name, _, place = key.partition(".")
        if place:
            listed = settings.get(name, 1.0)
            listed = listed if isinstance(listed, list) else [listed] * len(models)
            listed[int(place)] = value
            settings[name] = listed
        else:
            settings[name] = value
    return settings


@pytest.mark.parametrize(
    "dtypes", [(torch.float32,), (torch.bfloat16,), (torch.float16, torch.bfloat16)], ids=["f32", "bf16", "mixed"]
)
@pytest.mark.parametrize("name", GRIDS)
def test_every_variant_has_the_bits_of_its_own_merge(name, dtypes):
    method, (grid, settings) = name.split()[0], GRIDS[name]
    base, models = inputs_of(method, *family(3, base_dtype=dtypes[-1], model_dtypes=dtypes))
    found = peta_fast.sweep(method=method, base=base, models=models, grid=grid, **settings)
    seen = set()
    for variant in found:
        keywords = settings_of(variant.parameters, settings, models)
        assert_same_bits(variant.state, peta_fast.merge_state_dicts(base, models, method=method, **keywords))
        seen.add(variant.index)
    assert seen == set(range(len(found))) and len(found) == math.prod(map(len, grid.values()))


def test_many_variants_in_small_batches_and_few_slots(monkeypatch):
    """More points than a window takes, tensors in several calls, and exact equals everywhere."""
    monkeypatch.setattr(_variant_memory, "WINDOW", 5)
    monkeypatch.setattr(_variant_memory, "BATCH", 100)
    base, models = coarse_family(3, dtype=torch.bfloat16)
    grid = {"density": [0.1, 0.3, 0.9], "weight": [0.2, 0.7, 1.0]}
    found = peta_fast.sweep(method="ties", base=base, models=models, grid=grid, max_memory=7000)
    for variant in found:
        single = peta_fast.merge_state_dicts(base, models, method="ties", **variant.parameters)
        assert_same_bits(variant.state, single)


def test_masks_of_a_state_dict():
    base, models = family(2)
    masks = {n: torch.rand(t.shape) for n, t in base.items()}
    grid = {"weight": [0.5, 2.0], "mask_rescale": ["none", "mean"]}
    settings = {"method": "masked_task_arithmetic", "mask": masks}
    for variant in peta_fast.sweep(base=base, models=models, grid=grid, **settings):
        assert_same_bits(variant.state, peta_fast.merge_state_dicts(base, models, **settings, **variant.parameters))


def test_numpy_comes_out_where_numpy_goes_in():
    base = {"a": np.ones((3, 4), np.float32), "steps": np.arange(3)}
    models = [{"a": base["a"] * k, "steps": base["steps"]} for k in (2, 3)]
    (variant,) = peta_fast.sweep(method="task_arithmetic", base=base, models=models, grid={"weight": [0.5]})
    assert variant.state["a"].tolist() == (np.ones((3, 4)) * 2.5).tolist()
    assert variant.state["steps"].tolist() == [0, 1, 2]


def test_models_in_another_form_than_elements_go_through_their_own_merges(monkeypatch):
    """Where a source hands over something else than fp32, fp16 or bf16, only the engine of one merge may read it."""
    from peta_fast import _variants

    monkeypatch.setattr(_variants, "MERGEABLE", ())
    monkeypatch.setattr(_variants, "merge_variants", lambda jobs, threads: [] if not jobs else pytest.fail("shared"))
    base, models = family(2)
    for variant in peta_fast.sweep(method="ties", base=base, models=models, grid={"density": [0.2, 0.6]}):
        single = peta_fast.merge_state_dicts(base, models, method="ties", **variant.parameters)
        assert_same_bits(variant.state, single)


# A live model


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(VOCAB, HIDDEN)
        self.head = torch.nn.Linear(HIDDEN, VOCAB, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.arange(4))


def test_a_live_model_takes_each_variant_and_what_it_held_as_the_base_comes_back():
    model = Tied()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    draw = torch.Generator().manual_seed(0)
    moved = torch.randn(VOCAB, HIDDEN, generator=draw)
    tuned = [{**before, "embed.weight": before["embed.weight"] + k * moved} for k in (0.1, 0.3)]
    tuned = [{**t, "head.weight": t["embed.weight"]} for t in tuned]
    grid = {"weight": [0.2, 0.7], "density": [0.5, 1.0]}
    for variant in peta_fast.sweep(method="ties", base=model.state_dict(), models=tuned, grid=grid, into=model):
        expected = peta_fast.merge_state_dicts(
            {**before, "head.weight": before["embed.weight"]}, tuned, method="ties", **variant.parameters
        )
        assert variant.state is model and model.head.weight is model.embed.weight
        assert_same_bits(dict(model.state_dict()), expected)
        with torch.no_grad():
            model.embed.weight.mul_(1e3)  # whatever an evaluator leaves
    assert_same_bits(dict(model.state_dict()), before)


def test_strided_targets_are_filled_by_way_of_a_copy():
    base, models = family(2, shapes={"w": (6, 8)})
    into = {"w": torch.zeros(8, 6).t()}
    for variant in peta_fast.sweep(method="ties", base=base, models=models, grid={"weight": [0.2, 0.5]}, into=into):
        single = peta_fast.merge_state_dicts(base, models, method="ties", **variant.parameters)
        assert torch.equal(into["w"], single["w"]) and into["w"].stride() == (1, 6)


def test_a_target_that_does_not_fit_is_refused():
    base, models = family(2, shapes={"w": (6, 8)})
    keywords = {"method": "ties", "base": base, "models": models, "grid": {"weight": [1]}}
    with pytest.raises(CompatibilityError, match="lacks 'w'"):
        list(peta_fast.sweep(**keywords, into={"v": torch.zeros(6, 8)}))
    with pytest.raises(CompatibilityError, match="expected F32"):
        list(peta_fast.sweep(**keywords, into={"w": torch.zeros(6, 8, dtype=torch.float16)}))
    with pytest.raises(RecipeError, match="expected a model or a dict"):
        list(peta_fast.sweep(**keywords, into=3))


# Files


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folders base, a, b in bf16, the base and b in shards, and recipes."""
    folder = tmp_path_factory.mktemp("family")
    names = {"model.embed.weight": (900, 400), "model.norm.weight": (70,)}
    names |= {f"model.layers.{i}.up.weight": (90, 70) for i in range(2)}
    base, models = save_family(folder, dtype=torch.bfloat16, names=names)
    for name, state in (("base", base), ("b", models[1])):
        shutil.rmtree(folder / name)
        save_model(folder / name, state, shards=3)
    for method in ("ties", "dare_linear"):
        (folder / f"{method}.yml").write_text(
            f"# weights are swept\nmerge_method: {method}\nbase_model: {folder}/base\nmodels:\n"
            f"  - model: {folder}/a\n    parameters: {{weight: 1e-1, density: 0.9}}\n"
            f"  - model: {folder}/b\n    parameters:\n      weight: 0.5\n"
            f"parameters:\n  density:\n    - {{filter: up, value: [0.2, 0.4]}}\n    - value: 0.3\n"
            f"dtype: bfloat16\n"
        )
    return folder


@pytest.mark.parametrize("method, grid", [
    ("ties", ["density=0.2,0.5", "weight=0.5:1.0:0.5"]),
    ("ties", ["weight.b=0:1:0.5"]),
    ("dare_linear", ["density.0=0.3,0.6", "seed=0,9"]),
])  # fmt: skip
def test_checkpoints_are_byte_for_byte_those_of_single_merges(method, grid, folder, tmp_path):
    found = peta_fast.sweep(folder / f"{method}.yml", grid=grid)
    outcomes = found.write(tmp_path / "all", max_memory="10MB", max_shard_size=30_000)
    in_memory = {v.index: {n: t.clone() for n, t in v.state.items()} for v in found}
    assert [o.name for o in outcomes] == [found.grid.name(i) for i in range(len(found))]
    for index, outcome in enumerate(outcomes):
        recipe = tmp_path / f"{index}.yml"
        recipe.write_text(found.grid.text_of(index))
        peta_fast.merge(recipe, tmp_path / str(index), max_shard_size=30_000)
        assert outcome.error is None and outcome.report.out == outcome.out
        assert files_of(outcome.out) == files_of(tmp_path / str(index))
        assert verify(outcome.out) == []
        assert_same_bits(load(outcome.out), in_memory[index])


def test_a_killed_sweep_to_disk_goes_on(folder, tmp_path, monkeypatch):
    found = peta_fast.sweep(folder / "ties.yml", grid=["weight=0.5,1", "density=0.2,0.5"])
    found.write(tmp_path / "whole", max_memory="12MB")
    original, calls = _run_variants._Lanes._make_slab, []

    def dying(self, *words):
        calls.append(words)
        if len(calls) == 3:
            raise KeyboardInterrupt
        original(self, *words)

    with monkeypatch.context() as patch:
        patch.setattr(_run_variants._Lanes, "_make_slab", dying)
        with pytest.raises(KeyboardInterrupt):
            found.write(tmp_path / "out", max_memory="12MB")
    assert all("--resume" in str(o.error) for o in found.write(tmp_path / "out", max_memory="12MB"))
    outcomes = found.write(tmp_path / "out", max_memory="12MB", resume=True)
    assert all(0 < o.report.skipped_bytes < 700_000 for o in outcomes)
    for outcome in outcomes:
        assert files_of(outcome.out) == files_of(tmp_path / "whole" / outcome.name)
    again = found.write(tmp_path / "out", resume=True)
    assert all(o.report.bytes_written == 0 for o in again)


# Evaluating


def test_what_an_evaluator_says_is_kept_in_tables_a_picture_and_a_journal(folder, tmp_path):
    found = peta_fast.sweep(folder / "ties.yml", grid=["weight=0.2,0.4", "density=0.2,0.5,1"])
    asked = []

    def evaluate(state, parameters):
        asked.append(dict(parameters))
        if parameters["density"] == 0.5 and len(asked) < 7:
            raise ValueError("no such luck")
        return {"loss": float(state["model.norm.weight"].float().abs().mean()), "density": -parameters["density"]}

    results = found.evaluate(evaluate, tmp_path / "out", best="min", name="mine")
    assert len(asked) == 6 and len(results.points) == 6
    assert [p.error for p in results.failed] == ["ValueError: no such luck"] * 2
    rows = list(csv.DictReader((tmp_path / "out" / "results.csv").open()))
    assert [r["score.density"] for r in rows[:3]] == ["-0.2", "", "-1.0"], "a score that is called as an axis is"
    assert [(float(r["weight"]), float(r["density"])) for r in rows] == [
        (w, d) for w in (0.2, 0.4) for d in (0.2, 0.5, 1)
    ]
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    losses = [p["scores"]["loss"] for p in written["points"] if p["scores"]]
    assert written["best"]["scores"]["loss"] == min(losses) and written["metric"] == "loss"
    assert (tmp_path / "out" / "results.png").read_bytes().startswith(b"\x89PNG")
    best = {v.index: {n: t.clone() for n, t in v.state.items()} for v in found}
    place = next(i for i in range(6) if found.grid.point(i) == dict(results.best.parameters))
    assert_same_bits(load(tmp_path / "out" / "best"), best[place])

    with pytest.raises(ResourceError, match="holds a sweep already"):
        found.evaluate(evaluate, tmp_path / "out", name="mine")
    with pytest.raises(ResourceError, match="another sweep"):
        found.evaluate(evaluate, tmp_path / "out", name="another", resume=True)
    wider = peta_fast.sweep(folder / "ties.yml", grid=["weight=0.2,0.4", "density=0.2,0.5,1,0.7"])
    asked_before = len(asked)
    results = wider.evaluate(evaluate, tmp_path / "out", best="min", metric="density", name="mine", resume=True)
    fresh = asked[asked_before:]
    assert len(fresh) == 4 and {p["density"] for p in fresh} == {0.5, 0.7}, "the failed and the new ones alone"
    assert not results.failed and results.best.scores["density"] == -1


def test_an_interrupted_evaluation_keeps_what_is_done_and_a_torn_line_is_forgotten(folder, tmp_path):
    found = peta_fast.sweep(folder / "ties.yml", grid=["weight=0.1:0.5:0.1"])
    asked = []

    def evaluate(state, parameters):
        asked.append(parameters["weight"])
        if len(asked) == 4:
            raise KeyboardInterrupt
        return parameters["weight"]

    with pytest.raises(KeyboardInterrupt):
        found.evaluate(evaluate, tmp_path)
    with open(tmp_path / JOURNAL, "a") as journal:
        journal.write('{"parameters": {"weight": 0.4}, "sco')
    results = found.evaluate(evaluate, tmp_path, resume=True)
    assert asked == [0.1, 0.2, 0.3, 0.4, 0.4, 0.5]
    assert [p.scores["score"] for p in results.points] == [0.1, 0.2, 0.3, 0.4, 0.5]


@pytest.mark.parametrize("returned", ["good", None, {}, {"a": "b"}, True, [1.0]])
def test_what_is_no_score_is_recorded(returned, folder):
    found = peta_fast.sweep(folder / "ties.yml", grid=["weight=0.1,0.2"])
    results = found.evaluate(lambda state, parameters: returned)
    assert all(p.error.startswith("TypeError: expected a number") for p in results.points)


def test_nan_is_never_the_best(folder):
    found = peta_fast.sweep(folder / "ties.yml", grid=["weight=0.1,0.2,0.3"])
    scores = {0.1: math.nan, 0.2: 1.0, 0.3: 2.0}
    for which, best in (("max", 0.3), ("min", 0.2)):
        results = found.evaluate(lambda state, parameters: np.float64(scores[parameters["weight"]]), best=which)
        assert results.best.parameters == {"weight": best}
    with pytest.raises(RecipeError, match="expected one of score, got 'loss'"):
        found.evaluate(lambda state, parameters: 1.0, metric="loss")


def test_a_result_that_overflows_is_one_failed_point():
    base, models = family(2, base_dtype=torch.float16, model_dtypes=(torch.float16,))
    found = peta_fast.sweep(method="task_arithmetic", base=base, models=models, grid={"weight": [0.5, 1e7, 1.0]})
    results = found.evaluate(lambda state, parameters: 1.0)
    assert [bool(p.error) for p in results.points] == [False, True, False]
    assert "overflow" in results.points[1].error
    last = list(found)
    assert last[1].error is not None
    with pytest.raises(CheckpointError):
        last[1].state  # noqa: B018


@pytest.mark.parametrize("into", [False, True])
def test_nan_in_an_input_ends_the_sweep_by_name(into):
    base, models = family(2)
    models[1]["norm.bias"][3] = math.nan
    target = {n: t.clone() for n, t in base.items()} if into else None
    found = peta_fast.sweep(method="ties", base=base, models=models, grid={"weight": [0.5, 1.0]}, into=target)
    with pytest.raises(CheckpointError, match="model 1: 'norm.bias'"):
        found.evaluate(lambda state, parameters: 1.0)


# Grids


def test_axes_as_they_are_spelled():
    axes = {
        a.key: a.values for a in read_axes(["weight=0.1:1.0:0.1", "density=0.1, 0.2,5e-1", "k=3:0:-1,7", "b=true,x"])
    }
    assert axes == {
        "weight": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0), "density": (0.1, 0.2, 0.5), "k": (3, 2, 1, 0, 7),
        "b": (True, "x"),
    }  # fmt: skip


@pytest.mark.parametrize("text, said", [
    ("weight", "expected KEY=VALUE"), ("weight=", "expected KEY=VALUE"), ("weight=0:1", "expected START:STOP:STEP"),
    ("weight=0:1:0", "no values"), ("weight=0:1:-0.1", "no values"), ("weight=a:b:c", "expected START:STOP:STEP"),
    ("weight=0:1e12:1e-3", "1,000,000,000,000,001 values"), ("weight=nan:1:1", "no values"),
])  # fmt: skip
def test_axes_that_cannot_be_read(text, said):
    with pytest.raises(RecipeError, match=said):
        read_axes([text])


@pytest.mark.parametrize("grid, said", [
    ({"weigth": [1]}, "'weigth' is not a key of ties; did you mean 'weight'"),
    ({"weight.c": [1]}, "no model is called 'c'"),
    ({"weight.7": [1]}, "no model is called '7'"),
    ({"normalize.a": [True]}, "'normalize' holds for all models"),
    ({"density": [0.5, 1.5]}, "'density' is 1.5, expected a finite number from 0 to 1"),
    ({"density": ["high"]}, "'density' is 'high'"),
    ({"weight": []}, "'weight' has no values"),
    ({"weight": [1, 1.0]}, "has a value twice"),
    ({"lambda": [1], "scaling": [2]}, "'scaling' is given twice"),
    ({"weight.a": [1], "weight": [2]}, "'weight' is given twice"),
    ({"weight.a": [1], "weight.0": [2]}, "'weight.0' is given twice"),
    ({"seed": [-1]}, "'seed' takes integers"),
    ({"trim_scope": ["all"]}, "'trim_scope' is 'all'"),
    ({}, "at least one"),
])  # fmt: skip
def test_grids_that_do_not_fit_the_recipe(grid, said, folder):
    with pytest.raises(RecipeError, match=said):
        peta_fast.sweep(folder / "ties.yml", grid=grid)


def test_all_faults_of_a_grid_at_once(folder):
    with pytest.raises(RecipeError, match="weigth.*densty"):
        peta_fast.sweep(folder / "ties.yml", grid={"weigth": [1], "densty": [1]})


def test_a_key_that_the_grid_gives_may_be_missing_in_the_recipe(folder, tmp_path):
    text = (folder / "dare_linear.yml").read_text().replace("weight: 0.5", "density: 0.5").replace("weight: 1e-1, ", "")
    (tmp_path / "recipe.yml").write_text(text)
    with pytest.raises(RecipeError, match="has no 'weight'"):
        load_recipe(tmp_path / "recipe.yml")
    assert len(list(peta_fast.sweep(tmp_path / "recipe.yml", grid={"weight": [0.1, 0.2]}))) == 2
    with pytest.raises(RecipeError, match="has no 'weight'"):
        peta_fast.sweep(tmp_path / "recipe.yml", grid={"density": [0.1, 0.2]})


def test_millions_of_points_are_counted_and_not_begun(folder, tmp_path):
    found = peta_fast.sweep(folder / "ties.yml", grid=["weight=0:1:0.0001", "density=0:1:0.0001"])
    assert len(found) == 10_001**2
    for begin in (lambda: found.evaluate(lambda *_: 1.0, tmp_path), lambda: found.write(tmp_path)):
        with pytest.raises(RecipeError, match=r"has 100,020,001 points.*\n.*--yes"):
            begin()
    assert list(tmp_path.iterdir()) == []
    assert next(iter(found)).state, "one after another they can be had"


def test_the_order_keeps_together_what_shares_most(folder):
    grid = Grid(
        load_recipe(folder / "ties.yml"), axes_of({"lambda": [1, 2], "weight": [1, 2, 3], "density": [0.1, 0.2]})
    )
    order = list(grid.order())
    assert sorted(order) == list(range(12)) and grid.block() == 6
    assert len({grid.point(i)["density"] for i in order[:6]}) == 1
    assert [grid.point(i)["lambda"] for i in order[:4]] == [1, 2, 1, 2]
    assert grid.point(1) == {"lambda": 1.0, "weight": 1.0, "density": 0.2}


def test_names_are_folders_and_differ(folder):
    recipe = load_recipe(folder / "ties.yml")
    grid = Grid(recipe, axes_of({"weight.a": [0.5, -1e-7], "normalize": [True, False]}))
    names = [grid.name(i) for i in range(len(grid))]
    assert names[0] == "weight.a-0.5_normalize-true" and len(set(names)) == 4
    assert all("/" not in n for n in names)
