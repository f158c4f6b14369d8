"""Hostile use of the command line: one clear message, the exit code of its kind, and nothing half-written or lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from adapter_files import change_config, change_tensors, save_base, save_peft
from command_line import runner, write_models
from model_folders import files_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_models import linearized

import peta_fast as pf
from peta_fast.errors import ResourceError
from peta_fast.formats.disk import write_together
from peta_fast.formats.lora_adapter import open_adapter

pytest.importorskip("peft", reason="peft is not installed: pip install 'peta_fast[peft]'")


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> Path:
    """base, adapters a and b, a linearized adapter lin, base with a applied: tuned."""
    folder = tmp_path_factory.mktemp("originals")
    save_base(folder / "base")
    for seed, name in enumerate("ab"):
        save_peft(folder / name, seed=seed)
    pf.save_adapter(linearized("gaussian", torch.float32), folder / "lin")
    pf.apply_adapters(folder / "base", [folder / "a"], folder / "tuned")
    return folder


@pytest.fixture
def place(originals, tmp_path, monkeypatch) -> Path:
    """A copy of them, to be spoiled, as the current folder."""
    shutil.copytree(originals, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "here"


@pytest.fixture
def run(capsys):
    return runner(capsys)


def refused(found: tuple[int, str, str], code: int, *said: str) -> None:
    """The exit code, all the words, one message of few lines and no traceback."""
    got, _, err = found
    assert got == code, err
    assert all(words in err for words in said), err
    assert "Traceback" not in err and err.count("peta-fast: ") == 1 and len(err.splitlines()) <= 6


# ---------------------------------------------------------------- configs of adapters

CONFIGS = {
    "r": [0, "3", True, 3.0, -1],
    "lora_alpha": ["x", True, float("nan"), float("inf"), 10**400, [1]],
    "rank_pattern": [[1], {"(": 3}, {"q": 0}],
    "alpha_pattern": ["q", {"[": 1.0}, {"q": "1"}],
    "use_rslora": ["false", 1],
    "fan_in_fan_out": ["yes"],
    "base_model_name_or_path": [5, ["x"]],
    "modules_to_save": [4, [4], "x"],
    "target_modules": [3, [3]],
}


@pytest.mark.parametrize("field, value", [(f, v) for f, values in CONFIGS.items() for v in values], ids=str)
def test_a_field_of_a_config_of_another_kind_is_named(field, value, place):
    change_config(place / "a", **{field: value})
    with pytest.raises(pf.CheckpointError, match=f"adapter_config.json: {field} is ") as caught:
        open_adapter("a")
    assert ", expected " in str(caught.value)


def test_fields_that_are_null_have_their_defaults(place):
    before = open_adapter("b").modules
    change_config(place / "b", **dict.fromkeys(set(CONFIGS) - {"r", "lora_alpha"}))
    assert open_adapter("b").modules == before


def test_factors_of_integers_are_named(place, run):
    change_tensors(place / "a", lambda t: {k: v.to(torch.int32) for k, v in t.items()})
    refused(run("adapter", "merge", "a", "b", "--out", "o"), 4, "a/adapter_model.safetensors", "lora_A.weight' is I32")
    assert not (place / "o").exists()


# ---------------------------------------------------------------- words that do not fit

WORDS = [
    (["merge", "a", "b", "--set", "lambda=["], 2, "value as in YAML, got 'lambda=['"),
    (["merge", "a", "b", "--set", "method=ties"], 2, "expected a key of the method, got 'method'"),
    (["merge", "a", "b", "--set", "out=x"], 2, "expected a key of the method, got 'out'"),
    (["merge", "a", "b", "--set", "lambda=1", "--set", "lambda=2"], 2, "'lambda' is given twice"),
    (["apply", "base", "a", "--set", "weights=3"], 2, "expected a key of the method, got 'weights'"),
    (["merge", "a+b", "b"], 2, "got 'a+b', a model with adapters on it"),
    (["extract", "tuned+a", "base"], 2, "got 'tuned+a', a model with adapters on it"),
    (["extract", "tuned@x@y", "base"], 2, "expected a path or hub id, got 'tuned@x@y'"),
    (["extract", "tuned", "base", "--seed", str(1 << 70)], 2, "seed: expected an integer from 0 to 2^63 - 1"),
    (["extract", "tuned", "base", "--targets", ""], 2, "There are classifier, embed, k_proj"),
    (["extract", "tuned", "base", "--targets", "("], 2, "'(' matches no matrix"),
]


@pytest.mark.parametrize("words, code, said", WORDS, ids=lambda value: " ".join(value) if type(value) is list else None)
def test_words_that_do_not_fit(words, code, said, place, run):
    refused(run("adapter", *words, "--out", "o"), code, said)
    assert not (place / "o").exists()


@pytest.mark.parametrize("text, said", [
    ("adapters: 3", "expected a list of adapters, got 3"),
    ("adapters: a", "expected a list of adapters, got 'a'"),
    ("adapters: [{adapter: a, parameters: 3}]", "adapters[0].parameters: expected a mapping, got 3"),
    ("parameters: 3\nadapters: [a]", "parameters: expected a mapping, got 3"),
    ("method: 3\nadapters: [a]", "got 3"),
    ("adapters: [a]\n---\nadapters: [b]", "expected one recipe, got 2 between ---"),
])  # fmt: skip
def test_recipes_of_adapters_that_are_none(text, said, place, run):
    (place / "r.yml").write_text(text)
    refused(run("adapter", "merge", "r.yml", "--out", "o"), 2, said)


# ---------------------------------------------------------------- linearized adapters that are damaged


def rewrite(file: Path, change) -> None:
    with safe_open(file, "pt") as stored:
        metadata = dict(stored.metadata())
    tensors = {name: t.clone() for name, t in load_file(file).items()}
    change(tensors, metadata)
    save_file(tensors, file, metadata)


SIDECAR = "linearization.safetensors"


def cut(file: Path, size: int = 60) -> None:
    file.write_bytes(file.read_bytes()[:size])


LINEARIZED = {
    "NaN": (
        lambda f: rewrite(f / SIDECAR, lambda t, m: t["layers.0.q_proj.delta_B"][0, :2].fill_(torch.nan)),
        "'layers.0.q_proj.delta_B': expected finite values, got 2 NaN or inf",
    ),
    "scaling": (
        lambda f: rewrite(f / SIDECAR, lambda t, m: m.update(scaling=m["scaling"].replace("2.0", "NaN"))),
        "has scaling nan, expected",
    ),
    "truncated": (lambda f: cut(f / SIDECAR), "linearization.safetensors: cannot be read"),
    "config": (lambda f: (f / "adapter_config.json").write_bytes(b"\xff"), "the configuration is not UTF-8"),
    "list": (lambda f: (f / "adapter_config.json").write_text("[]"), "adapter_config.json: expected a JSON object"),
    "plain": (lambda f: cut(f / "adapter_model.safetensors"), "adapter_model.safetensors: cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("name", LINEARIZED)
def test_an_export_of_something_damaged(name, place, run):
    spoil, said = LINEARIZED[name]
    spoil(place / "lin")
    refused(run("adapter", "export", "lin", "--out", "o"), 3, said)
    assert not (place / "o").exists()


def test_a_step_that_is_not_finite_is_not_merged(place, run):
    LINEARIZED["NaN"][0](place / "lin")
    words = ["lin", "--method", "ties", "--density", "0.5", "--space", "phi", "--out", "o"]
    refused(run("adapter", "merge", *words), 3, "lin/linearization.safetensors", "delta_B': expected finite values")


# ---------------------------------------------------------------- places that cannot take it

COMMANDS = {
    "merge": ["adapter", "merge", "a", "b"],
    "extract": ["adapter", "extract", "tuned", "base", "--rank", "3"],
    "export": ["adapter", "export", "lin"],
    "apply": ["adapter", "apply", "base", "a", "-q"],
    "report": ["report", "base", "tuned", "-q"],
}
SMALL = {name: words for name, words in COMMANDS.items() if name != "apply"}


@pytest.mark.parametrize("size", ["4k", "8k"])
@pytest.mark.parametrize("name", SMALL)
def test_a_full_disk_is_left_as_it_was(name, size, place, mount_disk, run):
    folder = mount_disk(f"size={size}")
    refused(
        run(*SMALL[name], "--out", folder / "new" / "out"), 5, "No space left on device (0 bytes free)", "Free some"
    )
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("name", SMALL)
def test_what_a_full_disk_holds_is_not_lost_to_force(name, place, mount_disk, run):
    folder = mount_disk("size=4m")
    assert run(*SMALL[name], "--out", folder / "out")[0] == 0
    before = files_of(folder / "out")
    space = os.statvfs(folder)
    (folder / "others").write_bytes(bytes(space.f_bavail * space.f_frsize - 4096))
    code, _, err = run(*SMALL[name], "--out", folder / "out", "--force")
    assert code == 5 and "No space left" in err
    assert files_of(folder / "out") == before


@pytest.mark.parametrize("name", COMMANDS)
def test_links_that_lead_to_themselves(name, place, run):
    os.symlink("round", place / "round")
    refused(run(*COMMANDS[name], "--out", "round"), 5, "round: ", "broken link")
    refused(run(*COMMANDS[name], "--out", "round/out"), 5, "round")
    assert os.readlink(place / "round") == "round"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_folder_in_the_way_of_a_file(name, place, run):
    in_the_way = {"apply": "model.safetensors", "report": "norms.csv"}.get(name, "adapter_model.safetensors")
    (place / "o" / in_the_way).mkdir(parents=True)
    code, _, err = run(*COMMANDS[name], "--out", "o", "--force")
    assert code == 5 and in_the_way in err and "folder" in err
    assert os.listdir("o") == [in_the_way]


@pytest.mark.parametrize("name", COMMANDS)
def test_the_output_is_no_input(name, place, run):
    inputs = [word for word in COMMANDS[name] if (place / word).is_dir()]
    before = files_of(place)
    for out in inputs:
        os.symlink(out, place / "link")
        for spelled in (out, f"{out}/sub", "link", f"./{out}/../{out}"):
            refused(run(*COMMANDS[name], "--out", spelled, "--force"), 5, "input")
        (place / "link").unlink()
    assert files_of(place) == before


def test_names_with_blanks_and_other_letters(place, run):
    os.rename("a", "ein Adapter é 名")
    assert run("adapter", "merge", "ein Adapter é 名", "b", "--out", "zwei é/o")[0] == 0
    assert run("adapter", "apply", "base", "zwei é/o", "-q", "--out", "drei {x} %s")[0] == 0
    assert "ein Adapter é 名" in (place / "zwei é" / "o" / "README.md").read_text(encoding="utf-8")


def test_a_failed_write_takes_back_what_it_made(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "last").write_text("old")

    def fail(path: Path) -> None:
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_together(tmp_path / "out", {"first": b"1", "last": fail})
    assert files_of(tmp_path / "out") == {"last": b"old"}
    with pytest.raises(ResourceError, match="a folder"):
        write_together(tmp_path / "out", {"first": b"1", "..": b"2"})
    with pytest.raises(KeyboardInterrupt):
        write_together(tmp_path / "new" / "deep", {"first": b"1", "last": fail})
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    write_together(tmp_path / "out", {"first": b"1", "last": b"2"}, old=["absent", "gone"])
    assert files_of(tmp_path / "out") == {"first": b"1", "last": b"2"}


# ---------------------------------------------------------------- sweeps

SCORES = """
import os, sys, time
def good(state, parameters):
    return {"norm": float(state["layers.0.weight"].norm()), "weight": parameters["weight"]}
def slow(state, parameters):
    time.sleep(0.03)
    return good(state, parameters)
def leaving(state, parameters):
    sys.exit(3)
def broken(*arguments):
    raise ValueError("out of luck")
def nothing():
    return None
"""


@pytest.fixture
def models(tmp_path, monkeypatch) -> Path:
    write_models(tmp_path)
    (tmp_path / "scores.py").write_text(SCORES)
    (tmp_path / "divides.py").write_text("1 / 0\n")
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit(4)\n")
    (tmp_path / "wrong.py").write_text("def f(:\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


GRID = ["--grid", "weight=0.25:1:0.25", "-q"]


@pytest.mark.parametrize("words, said", [
    (["--eval", "divides.py:f"], "divides.py raised ZeroDivisionError: division by zero in "),
    (["--eval", "leaves.py:f"], "leaves.py raised SystemExit: 4 in "),
    (["--eval", "wrong.py:f"], "wrong.py cannot be imported: invalid syntax"),
    (["--eval", "scores.py:good", "--model", "scores.py:broken"], "scores.py:broken raised ValueError: out of luck"),
    (["--eval", "scores.py:good", "--model", "scores.py:nothing"], "to return a model, got None"),
])  # fmt: skip
def test_functions_that_fail_before_the_sweep(words, said, models, run):
    refused(run("sweep", "ties.yml", "o", *GRID, *words), 2, said)
    assert not (models / "o").exists()


def test_functions_of_a_report_that_fail(models, run):
    words = ("--eval", "scores:broken", "--points", "3", "-q", "--out", "o")
    refused(run("report", "base", "a", *words), 2, "--eval: scores:broken raised ValueError: out of luck in ", "line ")
    assert not (models / "o").exists()


def test_an_evaluator_that_leaves_is_recorded(models, run):
    code, _, err = run("sweep", "ties.yml", "o", *GRID, "--eval", "scores.py:leaving")
    assert code == 1 and "4 of 4 points failed" in err
    assert (models / "o" / "results.csv").read_text().count("SystemExit: 3") == 4


def test_a_metric_that_is_none_is_refused_at_the_first_point(models, run):
    refused(run("sweep", "ties.yml", "o", *GRID, "--eval", "scores.py:good", "--metric", "accuracy"), 2,
            "metric: expected one of norm, weight, got 'accuracy'")  # fmt: skip
    assert len((models / "o" / "peta_fast_sweep.jsonl").read_text().splitlines()) == 2


def test_a_journal_whose_scores_are_none_is_done_again(models, run):
    words = ("sweep", "ties.yml", "o", *GRID, "--eval", "scores.py:good", "--resume", "--json")
    before = json.loads(run(*words)[1])
    journal = models / "o" / "peta_fast_sweep.jsonl"
    lines = journal.read_text().splitlines()
    entry = json.loads(lines[1]) | {"scores": {"norm": "large"}}
    journal.write_text("\n".join([lines[0], json.dumps(entry), *lines[2:], ""]))
    after = json.loads(run(*words)[1])
    assert [p["scores"] for p in after["points"]] == [p["scores"] for p in before["points"]]


def test_a_stream_of_recipes_is_no_sweep(models, run):
    text = (models / "ties.yml").read_text()
    (models / "two.yml").write_text(f"{text}---\n{text}")
    refused(run("sweep", "two.yml", "o", *GRID), 2, "second of 2 documents, expected one recipe")


@pytest.mark.parametrize("grid, said", [
    ("weight.=1", "'weight.': no model is called ''"),
    ("weight=0:1e300:1", "has 1.0e+300 values, expected at most 1,000,000"),
])  # fmt: skip
def test_grids_of_nonsense(grid, said, models, run):
    refused(run("sweep", "ties.yml", "o", "--grid", grid, "-q"), 2, said)


@pytest.mark.parametrize("evaluator", [[], ["--eval", "scores.py:slow", "--best", "max"]], ids=["write", "evaluate"])
def test_a_sweep_that_is_killed_goes_on_to_the_same_bytes(evaluator, models, run):
    words = ["sweep", "ties.yml", "o", "--grid", "weight=0.1:1.2:0.1", "-q", *evaluator]
    assert run(*words)[0] == 0
    whole = {name: content for name, content in files_of(models / "o").items() if not name.startswith("results")}
    shutil.rmtree(models / "o")
    killed = subprocess.Popen([sys.executable, "-m", "peta_fast", *words], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while killed.poll() is None and time.monotonic() < deadline:
        journals = list((models / "o").rglob("*.jsonl")) if (models / "o").exists() else []
        if any(len(j.read_bytes().splitlines()) > 2 for j in journals):
            killed.send_signal(signal.SIGKILL)
            break
        time.sleep(0.002)
    killed.wait()
    assert run(*words, "--resume")[0] == 0
    found = {name: content for name, content in files_of(models / "o").items() if not name.startswith("results")}
    found.pop("peta_fast_sweep.jsonl", None)
    whole.pop("peta_fast_sweep.jsonl", None)
    assert found == whole and not any(name.endswith(".partial") for name in found)


@pytest.mark.parametrize("second", ["x", "y"])
def test_two_recipes_of_a_batch_that_write_into_one_folder(second, models, run):
    """By name, or by a link: the second one is refused, the first is whole."""
    text = (models / "ties.yml").read_text()
    (models / "batch.yml").write_text(f"name: x\n{text}---\nname: {second}\n{text}")
    (models / "o").mkdir()
    if second == "x":
        refused(run("merge", "batch.yml", "o", "-q"), 2, "second recipe with the name 'x'")
        return
    (models / "o" / "x").mkdir()
    os.symlink("x", models / "o" / "y")
    code, _, err = run("merge", "batch.yml", "o", "-q", "--force")
    assert code == 5 and "y: ResourceError" in err and "another process is merging into this folder" in err
    assert run("verify", "o/x")[0] == 0
