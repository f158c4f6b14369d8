"""Batches: many named recipes at once, each as if it had been merged alone; a failure is its own recipe's."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch
from command_line import LINEAR, TIES, runner, write_model, write_models
from model_folders import files_of, fine_tuned, save_model, tensors

import peta_fast
from peta_fast import _run_variants
from peta_fast._output import Output
from peta_fast.errors import CheckpointError, CompatibilityError, RecipeError, ResourceError
from peta_fast.journal import verify
from peta_fast.recipe import load_recipes

NAMES = {"model.embed.weight": (700, 300), "model.layers.0.bn.running_mean": (30,), "model.norm.weight": (300,)}


def recipe(folder, method="ties", models="ab", base="base", name=None, **rest) -> dict:
    shared = {"weight": 0.6, **({"density": 0.4} if method != "task_arithmetic" else {})}
    listed = [{"model": f"{folder}/{m}"} for m in models]
    named = {"name": name} if name else {}
    base = f"{folder}/{base}"
    return {"merge_method": method, "base_model": base, "models": listed, "parameters": shared, **named, **rest}


def stream(*recipes) -> str:
    return "---\n".join(json.dumps(r) + "\n" for r in recipes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folders base, a, b, c; `other` has another shape, `broken` a NaN."""
    folder = tmp_path_factory.mktemp("family")
    base = tensors(0, dtype=torch.bfloat16, names=NAMES)
    base["model.steps"] = torch.arange(3)
    save_model(folder / "base", base)
    for k, name in enumerate("abc"):
        save_model(folder / name, fine_tuned(base, 10 + k), shards=1 + k)
    save_model(folder / "other", {**base, "model.norm.weight": torch.ones(2, dtype=torch.bfloat16)})
    broken = fine_tuned(base, 3)
    broken["model.norm.weight"][7] = torch.nan
    save_model(folder / "broken", broken)
    return folder


def assert_as_merged_alone(outcomes, batch, tmp_path, **options):
    for outcome, (name, found) in zip(outcomes, load_recipes(batch), strict=True):
        assert outcome.name == name and outcome.error is None, outcome.error
        (tmp_path / "alone.yml").write_text(found.text)
        peta_fast.merge(tmp_path / "alone.yml", tmp_path / "alone" / name, **options)
        assert files_of(outcome.out) == files_of(tmp_path / "alone" / name), name
        assert verify(outcome.out) == []


def test_each_recipe_comes_out_as_if_merged_alone(folder, tmp_path, monkeypatch):
    """Other models, methods, masks of randomness, layouts: what can be shared is, and it shows in no byte."""
    batch = stream(
        recipe(folder, name="first"),
        recipe(folder, models="ac", name="other model"),
        recipe(folder, "dare_linear", models="abc", name="random", seed=4),
        recipe(folder, "task_arithmetic", name="sum"),
        recipe(folder, "della", name="ranked", compat="mergekit"),
        recipe(folder, name="whole model", compat="ties-authors", parameters={"density": 0.3, "lambda": 0.4}),
        recipe(folder, name="fp32", dtype="float32"),
        {"merge_method": "slerp", "base_model": f"{folder}/base", "models": [{"model": f"{folder}/a"}],
         "parameters": {"t": 0.3}, "name": "between"},
    )  # fmt: skip
    groups = []
    original = _run_variants._Lanes.run
    monkeypatch.setattr(_run_variants._Lanes, "run", lambda self: groups.append(len(self.lanes)) or original(self))
    outcomes = peta_fast.merge_batch(batch, tmp_path / "out", max_memory="60MB")
    assert groups == [7], "all but the one in fp32 have the same tensors"
    assert_as_merged_alone(outcomes, batch, tmp_path)


def test_a_failure_stops_its_own_recipe(folder, tmp_path):
    batch = stream(
        recipe(folder, name="good"),
        recipe(folder, models=["a", "other"], name="misfit"),
        recipe(folder, models=["a", "broken"], name="nan"),
        recipe(folder, models=["a", "missing"], name="missing"),
        recipe(folder, models="bc", name="fine"),
    )
    outcomes = peta_fast.merge_batch(batch, tmp_path / "out")
    assert [type(o.error) for o in outcomes] == [
        type(None),
        CompatibilityError,
        CheckpointError,
        CheckpointError,
        type(None),
    ]
    assert "'model.norm.weight'" in str(outcomes[2].error) and "broken" in str(outcomes[2].error)
    assert sorted(os.listdir(tmp_path / "out")) == ["fine", "good"], "nothing is left of those that failed"
    good = [outcomes[0], outcomes[4]]
    assert_as_merged_alone(
        good, stream(recipe(folder, name="good"), recipe(folder, models="bc", name="fine")), tmp_path
    )


def test_a_disk_that_fails_one_output_fails_that_one(folder, tmp_path, monkeypatch):
    original = Output.write

    def failing(self, slab, buffer):
        if self.out.name == "second":
            raise ResourceError(str(self.out), "cannot be written: no space left")
        original(self, slab, buffer)

    monkeypatch.setattr(Output, "write", failing)
    batch = stream(*(recipe(folder, name=n) for n in ("first", "second", "third")))
    outcomes = peta_fast.merge_batch(batch, tmp_path, max_memory="10MB")
    assert [o.error is None for o in outcomes] == [True, False, True]
    assert "no space left" in str(outcomes[1].error)
    assert files_of(tmp_path / "first").keys() == files_of(tmp_path / "third").keys()


def test_a_full_disk_is_seen_before_the_first_byte(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(_run_variants, "free_bytes", lambda path: 20 << 20)
    batch = stream(*(recipe(folder, name=n) for n in ("first", "second", "third")))
    with pytest.raises(ResourceError, match="for 3 outputs"):
        peta_fast.merge_batch(batch, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_finished_recipes_are_not_done_again(folder, tmp_path):
    batch = stream(recipe(folder, name="first"), recipe(folder, models="bc", name="second"))
    peta_fast.merge_batch(stream(recipe(folder, name="first")), tmp_path)
    outcomes = peta_fast.merge_batch(batch, tmp_path, resume=True)
    assert [o.report.bytes_written == 0 for o in outcomes] == [True, False]
    refused = peta_fast.merge_batch(batch, tmp_path)
    assert all(isinstance(o.error, ResourceError) for o in refused)


@pytest.mark.parametrize(
    "names, said", [(["../up"], "can be folders"), ([".."], "can be folders"), (["x", "x"], "second recipe")]
)
def test_names_must_be_folders(names, said, folder, tmp_path):
    batch = stream(*(recipe(folder, name=n) for n in names), recipe(folder))
    with pytest.raises(RecipeError, match=said):
        peta_fast.merge_batch(batch, tmp_path / "out")


def test_faults_of_the_text_are_all_told_before_any_work(folder, tmp_path):
    batch = stream(recipe(folder, name="good"), recipe(folder, "tyes"), recipe(folder, parameters={"wait": 1}))
    with pytest.raises(RecipeError, match="(?s)tyes.*wait"):
        peta_fast.merge_batch(batch, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_with_a_recipes_name_is_its_result(folder, tmp_path):
    last = {
        "merge_method": "linear",
        "models": [{"model": "first"}, {"model": "second"}],
        "parameters": {"weight": 0.5},
    }
    batch = stream({**last, "name": "last"}, recipe(folder, name="first"), recipe(folder, models="bc", name="second"))
    outcomes = peta_fast.merge_batch(batch, tmp_path / "out")
    assert [o.name for o in outcomes] == ["last", "first", "second"] and not any(o.error for o in outcomes)
    models = [{"model": str(tmp_path / "out" / n)} for n in ("first", "second")]
    peta_fast.merge(json.dumps({**last, "models": models}), tmp_path / "alone")
    alone, merged = files_of(tmp_path / "alone"), files_of(tmp_path / "out" / "last")
    assert alone["model.safetensors"] == merged["model.safetensors"]


def test_what_needs_a_failed_recipe_fails_too_and_circles_are_refused(folder, tmp_path):
    last = {"merge_method": "linear", "models": [{"model": "bad"}, {"model": f"{folder}/a"}], "name": "last"}
    last["parameters"] = {"weight": 0.5}
    bad = recipe(folder, models=["missing"], name="bad")
    outcomes = peta_fast.merge_batch(stream(bad, last), tmp_path / "out")
    assert "needs what 'bad' should have made" in str(outcomes[1].error)
    with pytest.raises(RecipeError, match="'bad', 'last' need each other"):
        peta_fast.merge_batch(stream({**bad, "base_model": "last"}, last), tmp_path / "out")


def test_more_recipes_than_memory_takes_at_once(tmp_path):
    base = tensors(0, dtype=torch.bfloat16, names={"w": (400, 700)})
    save_model(tmp_path / "base", base)
    save_model(tmp_path / "a", fine_tuned(base, 1))
    batch = stream(*(
        recipe(tmp_path, "task_arithmetic", "a", name=f"r{k}", parameters={"weight": k / 8}) for k in range(8)
    ))  # fmt: skip
    outcomes = peta_fast.merge_batch(batch, tmp_path / "out", max_memory="10MB")
    assert_as_merged_alone(outcomes, batch, tmp_path)


# The command line


@pytest.fixture
def models(tmp_path):
    return write_models(tmp_path)


@pytest.fixture
def run(capsys):
    return runner(capsys)


def test_merge_takes_a_batch(models, run):
    texts = [TIES.format(folder=models) + "name: one\n", LINEAR.format(folder=models) + "name: two\n"]
    (models / "batch.yml").write_text("---\n".join(texts))
    code, out, err = run("merge", models / "batch.yml", models / "out", "--json")
    assert code == 0 and [o["name"] for o in json.loads(out)] == ["one", "two"]
    run("merge", models / "ties.yml", models / "alone")
    alone, batched = files_of(models / "alone"), files_of(models / "out" / "one")
    assert alone["model.safetensors"] == batched["model.safetensors"]
    code, out, err = run("merge", models / "batch.yml", models / "out", "--resume", "-q")
    assert code == 0 and err == "" and out.count("were there already") == 2
    code, out, err = run("merge", models / "batch.yml", models / "none", "--dry-run")
    assert code == 0 and "two: 4 tensors" in out and not (models / "none").exists()


@pytest.mark.parametrize("broken, code", [("c", 3), ("d", 4)])
def test_the_exit_code_of_a_batch_is_that_of_its_failure(broken, code, models, run):
    other = {"layers.0.weight": np.ones((2, 2), np.float32)}
    write_model(models / "d", **other)
    text = TIES.format(folder=models)
    other = text.replace(f"{models}/b\n", f"{models}/{broken}\n")
    (models / "batch.yml").write_text(f"{text}---\n{other}")
    found, out, err = run("merge", models / "batch.yml", models / "out", "-q")
    assert found == code and "1 of 2 merges failed" in err and "merged 4 tensors" in out
    assert sorted(os.listdir(models / "out")) == ["0"]


EVALUATOR = """
import torch
def score(state, parameters):
    if parameters["weight"] == 0.5:
        raise RuntimeError("out of luck")
    return {"norm": float(state["layers.0.weight"].norm())}
def failing(state, parameters):
    raise RuntimeError("always")
def make():
    return Model()
class Model:
    def __init__(self):
        self.tensors = {f"layers.{i}.weight": torch.zeros(16, 8) for i in range(3)}
        self.tensors["ids"] = torch.zeros(4, dtype=torch.long)
    def state_dict(self):
        return self.tensors
def of_model(model, parameters):
    return model.tensors["layers.1.weight"].sum()
"""


@pytest.fixture
def evaluator(models):
    (models / "scores.py").write_text(EVALUATOR)
    return models / "scores.py"


def test_sweep_evaluates_and_writes_the_best(models, evaluator, run):
    words = ["sweep", models / "ties.yml", models / "out", "--grid", "weight=0.25:1:0.25", "density=0.3,0.6"]
    code, out, err = run(*words, "--eval", f"{evaluator}:score", "--best", "max")
    assert code == 0 and "8 points: 4 of weight x 2 of density" in err and "2 of 8 points failed" in err
    assert sorted(os.listdir(models / "out")) == [
        "best", "peta_fast_sweep.jsonl", "results.csv", "results.json", "results.png",
    ]  # fmt: skip
    assert "RuntimeError: out of luck" in (models / "out" / "results.csv").read_text()
    code, out, err = run(*words, "--eval", f"{evaluator}:score", "--resume", "--json", "-q")
    assert code == 0 and len(json.loads(out)["points"]) == 8
    code, out, err = run(*words, "--eval", f"{evaluator}:score")
    assert code == 5 and "--resume" in err


def test_sweep_merges_into_a_model(models, evaluator, run):
    words = ["sweep", models / "ties.yml", models / "out", "--grid", "weight=0.25,1", "--eval", f"{evaluator}:of_model"]
    code, out, err = run(*words, "--model", f"{evaluator}:make", "--json", "-q")
    scores = [p["scores"]["score"] for p in json.loads(out)["points"]]
    merged = [
        v.state["layers.1.weight"].sum().item() for v in peta_fast.sweep(models / "ties.yml", grid=["weight=0.25,1"])
    ]
    assert code == 0 and scores == merged


def test_sweep_without_an_evaluator_writes_every_point(models, run):
    code, out, err = run("sweep", models / "dare.yml", models / "out", "--grid", "seed=1,2", "--seed", 5)
    assert code == 0 and sorted(os.listdir(models / "out")) == ["seed-1", "seed-2"] and out.count("merged") == 2
    for seed in (1, 2):
        run("merge", models / "dare.yml", models / f"alone{seed}", "--seed", seed)
        alone = files_of(models / f"alone{seed}")["model.safetensors"]
        assert files_of(models / "out" / f"seed-{seed}")["model.safetensors"] == alone


@pytest.mark.parametrize("words, code, said", [
    ([], 2, "expected at least one KEY=VALUES"),
    (["--grid", "weigth=1"], 2, "did you mean 'weight'"),
    (["--grid", "weight=0:1:0.000001"], 2, "1,000,001 values"),
    (["--grid", "weight=0:1:0.001", "density=0:1:0.001"], 2, "Say --yes"),
    (["--grid", "weight=1", "--best", "max"], 2, "goes with --eval"),
    (["--grid", "weight=1", "--eval", "nonsense"], 2, "expected MODULE:FUNCTION"),
    (["--grid", "weight=1", "--eval", "no.such.module:f"], 2, "cannot import"),
    (["--grid", "weight=1", "--eval", "{scores}:scor"], 2, "Did you mean score?"),
    (["--grid", "weight=1", "--eval", "{scores}:score", "--best", "most"], 2, "expected max or min"),
    (["--grid", "weight=1", "--eval", "{scores}:score", "--metric", "x"], 2, "expected one of norm"),
    (["--grid", "weight=1", "--eval", "{scores}:failing"], 1, "1 of 1 points failed"),
])  # fmt: skip
def test_sweeps_that_cannot_be(words, code, said, models, evaluator, run):
    found, _, err = run("sweep", models / "ties.yml", models / "out", *(w.format(scores=evaluator) for w in words))
    assert found == code and said in err


def test_a_dry_run_of_a_sweep_lists_the_points(models, run):
    words = [
        "sweep",
        models / "ties.yml",
        models / "out",
        "--grid",
        "weight=0:1:0.001",
        "density=0:1:0.001",
        "--dry-run",
    ]
    code, out, err = run(*words)
    assert (
        code == 0 and "weight-0.0_density-0.001" in out and "1,002,001 points" in err and not (models / "out").exists()
    )
    code, out, _ = run(*words, "--json")
    assert json.loads(out)["points"] == 1_002_001
