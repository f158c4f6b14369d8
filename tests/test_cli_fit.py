"""`peta-fast fit`: what is learned on the command line merges by its recipe to what the Python functions give."""

from __future__ import annotations

import csv
import json

import pytest
import torch
from command_line import runner
from fit_cases import Toy, batches_of, toy_family
from model_folders import load, save_model
from torch import nn

import peta_fast as pf
from peta_fast.fit.tasks import Task

USER = """
import torch
from fit_cases import Toy, batches_of
from safetensors.torch import load_file

STOP_AFTER = None

def build(width=8):
    return Toy()

def loaded(path):
    model = Toy()
    model.load_state_dict(load_file(f"{path}/model.safetensors"))
    return model

def loaded_a():
    return loaded("a")

def renamed(path):
    return loaded("a")

def sized(path):
    if path.name != "b":
        return loaded(path)
    model = wide()
    model.load_state_dict(load_file(f"{path}/model.safetensors"))
    return model

def wide():
    model = Toy()
    model.head = torch.nn.Linear(8, 6)
    return model

def no_module():
    return {}

def _labelled(task):
    shift = {"a": 0, "b": 1}.get(task, 2)
    for i, x in enumerate(batches_of(5)):
        yield x + shift, torch.arange(6) % 4

class Loader:
    def __init__(self, task):
        self.rows = list(_labelled(task))
    def __len__(self):
        return len(self.rows)
    def __iter__(self):
        for i, row in enumerate(self.rows):
            if i == STOP_AFTER:
                raise KeyboardInterrupt
            yield row

def batches(task):
    return Loader(task)

def once(task):
    return _labelled(task)

def of_all():
    return Loader("a")

def inputs(task):
    return [x for x, _ in _labelled(task)]

def broken(task):
    yield next(_labelled(task))
    raise KeyError("no such column")

def nan(task):
    return [(x * float("nan"), y) for x, y in _labelled(task)]

def squares(model, batch):
    return model(batch[0]).square().sum(-1)
"""


@pytest.fixture
def run(capsys):
    return runner(capsys)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """base, a, b, and the user's functions; commands run in it."""
    _, base, tuned = toy_family(2)
    for name, state in zip(("base", "a", "b"), (base, *tuned), strict=True):
        save_model(tmp_path / name, state, config=None)
    (tmp_path / "user.py").write_text(USER)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def stop_after(batches: int | None) -> None:
    import sys

    sys.modules["user"].STOP_AFTER = batches


def network(name: str) -> nn.Module:
    model = Toy()
    model.load_state_dict(load_state(name))
    return model


def load_state(name: str) -> dict:
    from pathlib import Path

    return load(Path(name))


def labelled(task: str) -> list:
    shift = {"a": 0, "b": 1}[task]
    return [(x + shift, torch.arange(6) % 4) for x in batches_of(5)]


NET = ("--model", "user.py:build")


# Statistics


@pytest.mark.parametrize(
    ("kinds", "method", "collected"),
    [
        ("kfac", "mats", ("input_gram", "output_gram")),
        ("gram", "regmean", ("input_gram",)),
        ("fisher", "fisher", ("fisher",)),
    ],
)
def test_statistics_and_the_recipe_that_merges_with_them(kinds, method, collected, folder, run):
    words = ("--data", "user.py:batches", *NET, "--kinds", kinds, "--out", "stats", "--recipe", "merge.yml")
    code, out, err = run("fit", "statistics", "a", "b", *words)
    assert code == 0 and out.endswith("merge with them: peta-fast merge merge.yml OUT\n")
    assert "a: batches: 5 of 5" in err and "b: batches: 5 of 5" in err
    own = [pf.collect_statistics(network(t), labelled(t), kinds=collected) for t in "ab"]
    for task, exact in zip("ab", own, strict=True):
        found = pf.load_statistics(folder / "stats" / f"{task}.stats.safetensors")
        assert set(found) == set(exact) and all(torch.equal(found[k], exact[k]) for k in exact)
    assert run("merge", "merge.yml", "merged", "-q")[0] == 0
    states = [load_state(t) for t in "ab"]
    expected = pf.merge_state_dicts(None, states, method=method, statistics=own)
    merged = load_state("merged")
    assert all(torch.equal(merged[n], expected[n]) for n in expected)
    assert not torch.equal(merged["body.weight"], (states[0]["body.weight"] + states[1]["body.weight"]) / 2)


def test_the_recipe_is_printed_where_it_is_not_written_and_json_has_it_all(folder, run):
    words = ("fit", "statistics", "a", "b", "--data", "user.py:once", *NET, "--out", "stats")
    code, out, _ = run(*words)
    assert code == 0 and out.endswith(
        "method: regmean\nmodels:\n- model: a\n  parameters:\n    statistics: stats/a.stats.safetensors\n"
        "- model: b\n  parameters:\n    statistics: stats/b.stats.safetensors\n"
    )
    code, out, err = run(*words, "--json", "-q")
    found = json.loads(out)
    assert (code, err) == (0, "") and found["recipe"]["method"] == "regmean" and found["recipe_file"] is None
    assert [(row["task"], row["examples"], row["there"]) for row in found["statistics"]] == [
        ("a", 30, True), ("b", 30, True),
    ]  # fmt: skip


def test_networks_that_load_themselves_or_are_there_already(folder, run):
    exact = pf.collect_statistics(network("a"), labelled("a"))
    for words in (["a", "--model", "user.py:loaded"], ["--model", "user.py:loaded_a"]):
        code, _, _ = run("fit", "statistics", *words, "--data", "user.py:of_all", "--out", "x.safetensors", "--force")
        found = pf.load_statistics(folder / "x.safetensors")
        assert code == 0 and all(torch.equal(found[k], exact[k]) for k in exact)


def test_functions_and_choices_of_the_user_s_own(folder, run):
    words = ("fit", "statistics", "a", "--data", "user.py:inputs", *NET, "--kinds", "fisher", "--out", "x.safetensors")
    more = ("--loss", "user.py:squares", "--only", "head", "--examples", 7)
    code, _, err = run(*words, *more)  # of a batch that is a tensor, the first member is one row
    assert code == 4 and "loss: expected one value an example" in err
    words = ("fit", "statistics", "a", "--data", "user.py:batches", *words[5:])
    assert run(*words, *more)[0] == 0
    found = pf.load_statistics(folder / "x.safetensors")
    exact = pf.collect_statistics(
        network("a"), labelled("a"), kinds=("fisher",), examples=7, loss=lambda m, b: m(b[0]).square().sum(-1)
    )
    assert set(found) == {"head.weight.fisher", "head.bias.fisher"} and found.examples == 7
    assert all(torch.equal(found[k], exact[k]) for k in found)


def test_an_interrupted_collection_goes_on_and_ends_with_the_same_bytes(folder, run):
    words = ["fit", "statistics", "a", "b", "--data", "user.py:batches", *NET, "--kinds", "kfac", "--save-every", 2]
    assert run(*words, "--out", "whole")[0] == 0
    stop_after(3)
    code, out, err = run(*words, "--out", "part")
    assert code == 130 and out == "" and "Continue with:\n  peta-fast fit statistics a b --data" in err
    assert [p.name for p in (folder / "part").iterdir()] == ["a.stats.safetensors.unfinished"]
    stop_after(None)
    assert run(*words, "--out", "part", "--resume")[0] == 0
    for task in "ab":
        name = f"{task}.stats.safetensors"
        assert (folder / "part" / name).read_bytes() == (folder / "whole" / name).read_bytes()
    assert len(list((folder / "part").iterdir())) == 2


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["a", *NET, "--out", "x"], 2, "--data: is missing"),
        (["a", "--data", "user.py:batches", *NET], 2, "--out: is missing"),
        (["--data", "user.py:batches", "--out", "x"], 2, "MODEL: is missing"),
        (["a", "b", "--data", "user.py:of_all", *NET, "--out", "x"], 2, "takes no argument, and there are 2 models"),
        (["a", "b", "--data", "user.py:batches", *NET, "--out", "x.safetensors"], 2, "expected a folder"),
        (["a", "a/", "--data", "user.py:batches", *NET, "--out", "x"], 2, "a name of its own for each model"),
        (["a", "--data", "user.py:batches", *NET, "--out", "x", "--kinds", "gramm"], 2, "expected some of gram, kfac"),
        (["a", "--data", "user.py:batchs", *NET, "--out", "x"], 2, "Did you mean batches?"),
        (["a", "--data", "nowhere.py:f", *NET, "--out", "x"], 2, "nowhere.py cannot be imported"),
        (["a", "--data", "user.py:broken", *NET, "--out", "x"], 2, "broken raised KeyError: 'no such column'"),
        (["a", "--data", "user.py:inputs", *NET, "--out", "x", "--kinds", "kfac"], 4, "expected labels, found none"),
        (["a", "--data", "user.py:nan", *NET, "--out", "x", "--kinds", "fisher"], 3, "example 0: expected a finite"),
        (["a", "--data", "user.py:batches", "--model", "user.py:no_module", "--out", "x"], 4, "Module, got dict"),
        (["a", "--data", "user.py:batches", "--model", "user.py:wide", "--out", "x"], 4, "'head.weight' is [4, 8]"),
        (["a", "--data", "user.py:batches", "--out", "x"], 3, "Say --model MODULE:FUNCTION"),
        (["--data", "user.py:batches", "--model", "user.py:loaded", "--out", "x"], 2, "user.py:loaded takes a path"),
        (["no", "--data", "user.py:batches", *NET, "--out", "x"], 3, "no such local path: no"),
        (["a", "--data", "user.py:batches", *NET, "--out", "x", "--dtype", "int8"], 2, "expected one of auto, float32"),
        (["a", "--data", "user.py:batches", *NET, "--out", "x", "--device", "tpu"], 2, "'tpu' cannot be used"),
    ],
)  # fmt: skip
def test_statistics_that_cannot_be_collected(words, code, said, folder, run):
    found, out, err = run("fit", "statistics", *words)
    assert (found, out) == (code, "") and said in err
    assert not (folder / "x").exists() and not (folder / "x.safetensors").exists()


def test_checkpoints_with_other_names_than_the_network_s(folder, run):
    save_model(folder / "other", {f"net.{n}": t for n, t in load_state("a").items()}, config=None)
    words = ("--data", "user.py:batches", "--out", "x")
    code, _, err = run("fit", "statistics", "other", *words, *NET)
    assert code == 4 and "other: lacks 'body.weight' and 3 more, which the network has" in err
    code, _, err = run("fit", "statistics", "other", *words, "--model", "user.py:renamed")
    assert code == 4 and "has no 'body.weight', as the network calls it; it has 'net.body.weight'" in err
    assert not (folder / "x").exists()


def test_regmean_pp_and_its_recipe(folder, run):
    words = ("--data", "user.py:inputs", *NET, "--out", "stats", "--recipe", "merge.yml", "--off-diagonal", 0.7)
    code, out, _ = run("fit", "regmean-pp", "a", "b", *words, "--weights", "1,2")
    assert code == 0 and "a: 2 entries of 30 examples in stats/a.stats.safetensors" in out
    data = [[x for x, _ in labelled(t)] for t in "ab"]
    expected, _ = pf.regmean_pp([network("a"), network("b")], data, off_diagonal=0.7, weight=[1, 2])
    assert run("merge", "merge.yml", "merged", "-q")[0] == 0
    merged = load_state("merged")
    assert all(torch.equal(merged[n], expected[n]) for n in expected)
    assert run("fit", "regmean-pp", "a", "b", *words)[0] == 5
    assert run("fit", "regmean-pp", "a", "b", *words, "--weights", "1")[0] == 2


# Coefficients and masks


def tasks() -> list[Task]:
    return [Task(t, labelled(t)) for t in "ab"]


def toy() -> tuple[nn.Module, list[dict], dict]:
    return network("base"), [load_state("a"), load_state("b")], load_state("base")


def merged_by(run, folder: str) -> dict:
    assert run("merge", f"{folder}/recipe.yml", f"{folder}/merged", "-q")[0] == 0
    return load_state(f"{folder}/merged")


@pytest.mark.parametrize(
    ("words", "function", "options"),
    [
        (["adamerging", "--steps", 6], pf.adamerging, {"steps": 6}),
        (["adamerging", "--steps", 3, "--granularity", "task", "--initial", 0.4, "--loss", "cross_entropy"],
         pf.adamerging, {"steps": 3, "granularity": "task", "initial": 0.4, "loss": "cross_entropy"}),
        (["adamerging", "--steps", 3, "--density", 0.5, "--elect"], pf.adamerging,
         {"steps": 3, "density": 0.5, "elect": True}),
        (["concrete", "--steps", 4, "--adamerging", "--coefficient-steps", 3, "--seed", 5], pf.concrete_adamerging,
         {"steps": 4, "coefficient_steps": 3, "seed": 5}),
        (["concrete", "--steps", 4, "--adamerging", "--coefficient-steps", 2, "--mask", "binary"],
         pf.concrete_adamerging, {"steps": 4, "coefficient_steps": 2, "mask": "binary"}),
    ],
)  # fmt: skip
def test_a_fit_s_recipe_merges_to_the_fitted_model(words, function, options, folder, run):
    code, out, err = run("fit", words[0], "base", "a", "b", "--data", "user.py:once", *NET, "--out", "fit", *words[1:])
    assert code == 0 and out.endswith("merge with them: peta-fast merge fit/recipe.yml OUT\n")
    phases = list(dict.fromkeys(line.partition(":")[0] for line in err.splitlines()))
    assert phases == (["masks"] if words[0] == "concrete" else []) + ["coefficients"]
    model, tuned, base = toy()
    fitted = function(model, tuned, tasks(), base=base, **options)
    merged = merged_by(run, "fit")
    assert all(torch.equal(merged[n], t) for n, t in fitted.state_dict().items())
    with open(folder / "fit" / "history.csv") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["phase", "step", "a", "b"]
    assert [(r[0], int(r[1])) for r in rows[1:]] == [(p.phase, p.step) for p in fitted.history]
    assert [float(x) for x in rows[-1][2:]] == pytest.approx(fitted.history[-1].losses, rel=1e-8)
    assert not (folder / "fit" / "unfinished.safetensors").exists()


def test_concrete_task_arithmetic_to_one_rounding_and_json(folder, run):
    words = ("fit", "concrete", "base", "a", "b", "--data", "user.py:batches", *NET, "--out", "fit", "--steps", 4)
    code, out, err = run(*words, "--json", "-q")
    told = json.loads(out)
    assert (code, err) == (0, "") and told["recipe"] == "fit/recipe.yml" and told["masks"] == "fit/masks.safetensors"
    model, tuned, base = toy()
    fitted = pf.concrete_task_arithmetic(model, tuned, tasks(), base=base, steps=4)
    assert told["loss"] == {"first": fitted.history[0].loss, "last": fitted.history[-1].loss}
    merged = merged_by(run, "fit")
    for name, tensor in fitted.state_dict().items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-5, atol=1e-6)
    code, _, err = run(*words)
    assert code == 5 and "holds a fit already" in err
    assert run(*words, "--force")[0] == 0


def test_an_interrupted_fit_goes_on_to_the_same_files(folder, run):
    words = ["fit", "concrete", "base", "a", "b", "--data", "user.py:batches", *NET, "--steps", 4, "--save-every", 2,
             "--adamerging", "--coefficient-steps", 2]  # fmt: skip
    assert run(*words, "--out", "whole")[0] == 0
    stop_after(4)  # two batches of each task every step
    code, out, err = run(*words, "--out", "part")
    assert code == 130 and out == "" and "--out part --resume" in err
    assert [p.name for p in (folder / "part").iterdir()] == ["unfinished.safetensors"]
    stop_after(None)
    code, _, err = run(*words, "--out", "part")
    assert code == 5 and "Use --resume to go on with it" in err
    code, _, err = run(*words, "--out", "part", "--resume", "--seed", 3)
    assert code == 5 and "of other models or with other settings" in err
    assert run(*words, "--out", "part", "--resume")[0] == 0
    for name in ("history.csv", "masks.safetensors"):
        assert (folder / "part" / name).read_bytes() == (folder / "whole" / name).read_bytes()
    whole, part = merged_by(run, "whole"), merged_by(run, "part")
    assert all(torch.equal(part[n], whole[n]) for n in whole)


@pytest.mark.parametrize("builder", ["sized", "build"])
def test_heads_of_different_sizes_stay_with_their_tasks(builder, folder, run):
    """No recipe merges such files, so the merged rest is written."""
    state = load_state("b")
    state |= {"head.weight": torch.randn(6, 8), "head.bias": torch.randn(6)}
    save_model(folder / "b", state, config=None)
    words = (
        "fit",
        "adamerging",
        "base",
        "a",
        "b",
        "--data",
        "user.py:batches",
        "--steps",
        3,
        "--model",
        "user.py:sized",
    )
    code, _, err = run(*words, "--out", "fit")
    assert code == 4 and "--heads head" in err and not (folder / "fit").exists()
    code, out, err = run(*words, "--out", "fit", "--heads", "head")
    assert code == 0 and "no recipe can merge them" in err and out.endswith("merged without heads: fit/merged\n")
    base, tuned = load_state("base"), [load_state("a"), state]
    fitted = pf.adamerging(network("base"), tuned, tasks(), base=base, heads=["head"], steps=3)
    with open(folder / "fit" / "history.csv") as file:
        assert [float(x) for x in list(csv.reader(file))[-1][2:]] == pytest.approx(fitted.history[-1].losses, rel=1e-6)
    merged = load_state("fit/merged")
    assert set(merged) == {"body.weight", "body.bias"}
    assert all(torch.equal(t, fitted.state_dict()[n]) for n, t in merged.items())


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--data", "user.py:nan"], 2, "task 'a': its loss is nan in step 1"),
        (["--data", "user.py:inputs", "--loss", "cross_entropy"], 4, "needs labels, got batches without"),
        (["--data", "user.py:inputs", "--granularity", "block"], 2, "expected one of task, layer"),
        (["--data", "user.py:inputs", "--heads", "tail"], 2, "'tail' is no parameter's or module's name"),
        (["--data", "user.py:inputs", "--names", "x"], 2, "expected 2, one a model, got 1"),
        (["--data", "user.py:broken"], 2, "broken raised KeyError"),
    ],
)
def test_fits_that_cannot_be(words, code, said, folder, run):
    found, out, err = run("fit", "adamerging", "base", "a", "b", *NET, "--out", "fit", *words)
    assert (found, out) == (code, "") and said in err and not (folder / "fit").exists()


# Folders of transformers


HF_USER = """
import torch
def batches(task):
    draw = torch.Generator().manual_seed(len(task))
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2] * 2)
    def batch():
        ids, labels = (torch.randint(0, n, s, generator=draw) for n, s in ((50, (4, 6)), (3, (4,))))
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return [batch() for _ in range(2)]
"""


@pytest.fixture(scope="module")
def berts(tmp_path_factory):
    """A tiny BERT with a head for three classes, two steps away from it, and the same body without a head."""
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed: pip install 'peta_fast[peft]'"
    )
    folder = tmp_path_factory.mktemp("berts")
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=50,
        max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.BertForSequenceClassification(config)
        for name in ("base", "sst2", "rte"):
            model.save_pretrained(folder / name)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.05 * torch.randn_like(parameter))
        model.bert.save_pretrained(folder / "headless")
    (folder / "hf_user.py").write_text(HF_USER)
    return folder


def test_folders_of_transformers_need_no_function_for_the_network(berts, run, monkeypatch, tmp_path):
    import transformers

    monkeypatch.chdir(berts)
    out = tmp_path / "stats"
    words = ("--data", "hf_user:batches", "--kinds", "kfac", "--out", out, "--recipe", tmp_path / "mats.yml", "-q")
    code, _, err = run("fit", "statistics", "sst2", "rte", *words)
    assert (code, err) == (0, "")
    model = transformers.BertForSequenceClassification.from_pretrained(berts / "rte").eval()
    import hf_user

    exact = pf.collect_statistics(model, hf_user.batches("rte"), kinds=("input_gram", "output_gram"))
    found = pf.load_statistics(out / "rte.stats.safetensors")
    assert set(found) == set(exact) and all(torch.equal(found[k], exact[k]) for k in exact)
    code, told, _ = run("merge", tmp_path / "mats.yml", tmp_path / "merged", "-q")
    assert code == 0 and "solved 14 tensors by conjugate gradients" in told
    fit = ("fit", "adamerging", "base", "sst2", "rte", "--data", "hf_user:batches", "--steps", 2, "-q")
    assert run(*fit, "--out", tmp_path / "fit")[0] == 0
    assert run("merge", tmp_path / "fit" / "recipe.yml", tmp_path / "fit" / "merged", "-q")[0] == 0
    merged = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "fit" / "merged").eval()
    with torch.no_grad():
        assert merged(**hf_user.batches("x")[0]).logits.isfinite().all()


def test_a_head_that_transformers_would_draw_at_random_is_refused(berts, run, monkeypatch, tmp_path):
    config = json.loads((berts / "headless" / "config.json").read_text())
    config["architectures"] = ["BertForSequenceClassification"]
    (berts / "headless" / "config.json").write_text(json.dumps(config))
    monkeypatch.chdir(berts)
    code, _, err = run("fit", "statistics", "headless", "--data", "hf_user:batches", "--out", tmp_path / "x")
    assert code == 4 and "lacks 'classifier.bias' and 1 more, which the network has" in err
    assert not (tmp_path / "x").exists()


def test_a_head_that_is_tied_to_the_embedding_is_averaged_as_that(run, monkeypatch, tmp_path):
    """The file holds the tensor once, by the embedding's name."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=12, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name in ("a", "b"):
            transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / name)
    (tmp_path / "llama_user.py").write_text(HF_USER.replace("randint(0, n, s,", "randint(0, n, (4, 6),"))
    monkeypatch.chdir(tmp_path)
    words = (
        "--data",
        "llama_user.py:batches",
        "--kinds",
        "kfac,fisher",
        "--out",
        "stats",
        "--recipe",
        "mats.yml",
        "-q",
    )
    code, _, err = run("fit", "statistics", "a", "b", *words)
    assert code == 0 and "a: no Gram matrices of lm_head, whose weight is tied to another tensor" in err
    found = pf.load_statistics("stats/a.stats.safetensors")
    assert "lm_head.input_gram" not in found and "model.embed_tokens.weight.fisher" in found
    assert len([key for key in found if key.endswith("_gram")]) == 14
    assert run("merge", "mats.yml", "merged", "-q")[0] == 0
    merged, states = load_state("merged"), [load_state(name) for name in "ab"]
    mean = (states[0]["model.embed_tokens.weight"] + states[1]["model.embed_tokens.weight"]) / 2
    torch.testing.assert_close(merged["model.embed_tokens.weight"], mean, rtol=0, atol=1e-7)
