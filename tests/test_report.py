"""`peta-fast report`: figures, tables and the page, from checkpoints on disk and evaluators of the user's own."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import struct
import sys

import numpy as np
import pytest
import torch
from command_line import runner
from model_folders import save_family, save_model

import peta_fast as pf
from peta_fast.analysis.figures import Figure
from peta_fast.analysis.page import write_figures
from peta_fast.errors import PetaFastError, RecipeError, ResourceError

EVALUATORS = """
import torch

NAMES = ("a", "b")

def head(state):
    return state["lm_head.weight"].float()

def scores(state, parameters):
    return {name: 1.0 + float(head(state)[t].tanh().mean()) for t, name in enumerate(NAMES)}

def labels(state, task):
    return head(state)[:, :4]

def loss(state, task):
    return float((head(state) - NAMES.index(task)).square().mean())

def broken(state, parameters):
    return {"a": float("nan"), "b": 1.0}

NUMBER = 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    save_family(tmp_path, 3, dtype=torch.bfloat16)
    (tmp_path / "my_evaluators.py").write_text(EVALUATORS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("my_evaluators", None)


def rows_of(file) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(file.read_text())))


def png_size(content: bytes) -> tuple[int, int]:
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", content[16:24])


FROM_THE_PASS = ("cosine", "sign_conflicts_by_pair", "norms", "sign_conflicts")


def test_the_pass_becomes_pictures_tables_and_a_page(folder, capsys):
    code, out, err = runner(capsys)("report", "base", "a", "b", "c", "--out", "r", "--json")
    assert code == 0, err
    said = json.loads(out)
    assert said["figures"] == [*FROM_THE_PASS, "tensors"] and said["page"] == "r/index.html"
    assert {p.name for p in (folder / "r").iterdir()} == {
        "index.html", "tensors.csv", *(f"{n}.{kind}" for n in FROM_THE_PASS for kind in ("png", "csv"))
    }  # fmt: skip
    found = pf.analysis.measure("base", ["a", "b", "c"])
    cosine = rows_of(folder / "r" / "cosine.csv")
    read = np.array([[float(row[n]) for n in "abc"] for row in cosine])
    np.testing.assert_array_equal(read, found.total.cosine)
    norms = rows_of(folder / "r" / "norms.csv")
    assert [row["layer"] for row in norms] == list(found.layers)
    assert [float(row["relative norm b"]) for row in norms] == [s.relative[1] for s in found.layers.values()]
    conflicts = rows_of(folder / "r" / "sign_conflicts.csv")
    assert [float(r["share in any conflict"]) for r in conflicts] == [s.conflict_share for s in found.layers.values()]
    assert len(rows_of(folder / "r" / "tensors.csv")) == len(found.tensors)


def test_the_page_needs_nothing_but_itself(folder, capsys):
    runner(capsys)("report", "base", "a", "b", "--out", "r", "-q")
    page = (folder / "r" / "index.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert sources and all(s.startswith(("data:image/png;base64,", "data:text/csv;base64,")) for s in sources)
    assert "http" not in page and "<script" not in page
    pictures = [base64.b64decode(s.partition(",")[2]) for s in sources if s.startswith("data:image")]
    assert pictures == [(folder / "r" / f"{n}.png").read_bytes() for n in FROM_THE_PASS]
    assert all(min(png_size(p)) > 400 for p in pictures)
    tables = [base64.b64decode(s.partition(",")[2]).decode() for s in sources if s.startswith("data:text")]
    assert tables[0] == (folder / "r" / "cosine.csv").read_text()


def test_evaluators_add_the_figures_of_merges(folder, capsys):
    code, out, err = runner(capsys)(
        "report", "base", "a", "b", "--out", "r", "--json", "--points", 3, "--eval", "my_evaluators:scores",
        "--predict", "my_evaluators:labels", "--loss", "my_evaluators:loss", "-q",
    )  # fmt: skip
    assert code == 0, err
    merged = ["lambda", "score_curves", "merges", "disentanglement", "landscape"]
    assert json.loads(out)["figures"][-5:] == merged
    base, a, b = ({n: t.clone() for n, t in load_state(folder / n).items()} for n in ("base", "a", "b"))
    import my_evaluators

    direct = pf.analysis.lambda_curves(base, [a, b], my_evaluators.scores, names=["a", "b"], coefficients=[0, 0.5, 1])
    rows = rows_of(folder / "r" / "lambda.csv")
    assert [[float(r["a"]), float(r["b"])] for r in rows] == direct.scores.tolist()
    grid = rows_of(folder / "r" / "landscape.csv")
    assert len(grid) == 9 and float(grid[0]["loss"]) == pytest.approx(
        float(grid[0]["loss a"]) + float(grid[0]["loss b"])
    )
    assert len(rows_of(folder / "r" / "disentanglement.csv")) == 9
    for name in ("lambda", "score_curves", "disentanglement", "landscape"):
        assert min(png_size((folder / "r" / f"{name}.png").read_bytes())) > 400


def load_state(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_one_model_has_no_angles_and_trained_checkpoints_are_measured_alone(folder, capsys):
    base, tuned = load_state(folder / "base"), load_state(folder / "a")
    pf.save_trained(pf.TrainedTensors({"lm_head.weight": tuned["lm_head.weight"]}), folder / "part")
    code, out, err = runner(capsys)(
        "report", "base", "part", "--out", "r", "--json", "-q", "--eval", "my_evaluators:scores", "--points", 2
    )
    assert code == 0, err
    said = json.loads(out)
    assert said["figures"] == ["norms", "tensors", "lambda"]
    assert said["tensors measured"] == 1 and said["tensors left out"] == len(base) - 1


@pytest.mark.parametrize(
    "words, code, said",
    [
        (("base", "a", "missing"), 3, "missing"),
        (("base", "a", "a"), 2, "names a as a model twice|different names"),
        (("base", "a", "b", "--names", "x"), 2, "expected 2 different names"),
        (("base", "a", "--eval", "scores"), 2, "expected MODULE:FUNCTION or FILE.py:FUNCTION, got 'scores'"),
        (("base", "a", "--eval", "nowhere:scores"), 2, "cannot import 'nowhere'"),
        (("base", "a", "--eval", "my_evaluators:nothing"), 2, "has no function 'nothing'"),
        (("base", "a", "--eval", "my_evaluators:NUMBER"), 2, "has no function 'NUMBER'"),
        (("base", "a", "--predict", "my_evaluators:labels"), 2, "two models or more"),
        (("base", "a", "b", "--eval", "my_evaluators:broken"), 2, "a: expected a finite number, got nan"),
        (("base", "small"), 4, "lacks"),
        (("base", "a", "--points", "1"), 2, "from 2 on"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(folder, capsys, words, code, said):
    save_model(folder / "small", {"lm_head.weight": torch.ones(2)})
    found, _, err = runner(capsys)("report", *words, "--out", "r", "-q")
    assert found == code and re.search(said, err), err
    assert not (folder / "r").exists()


def test_a_report_is_replaced_only_if_asked(folder, capsys):
    run = runner(capsys)
    assert run("report", "base", "a", "--out", "r", "-q")[0] == 0
    before = (folder / "r" / "norms.png").stat().st_mtime_ns
    code, _, err = run("report", "base", "a", "--out", "r", "-q")
    assert code == 5 and "holds a report already" in err
    assert (folder / "r" / "norms.png").stat().st_mtime_ns == before
    assert run("report", "base", "a", "--out", "r", "-q", "--force")[0] == 0
    (folder / "file").write_text("")
    assert run("report", "base", "a", "--out", "file", "-q")[0] == 5


def test_nan_in_a_checkpoint_is_named(folder, capsys):
    state = load_state(folder / "a")
    state["lm_head.weight"][1, 2] = float("nan")
    save_model(folder / "nan", state)
    code, _, err = runner(capsys)("report", "base", "nan", "--out", "r", "-q")
    assert code == 3 and "nan/model.safetensors: 'lm_head.weight': expected finite values, got 1 NaN" in err


def test_without_matplotlib_the_command_says_so_before_it_reads(folder, capsys, monkeypatch):
    for name in [n for n in sys.modules if n.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = runner(capsys)("report", "base", "a", "--out", "r", "-q")
    assert code == 2 and "'matplotlib'" in err and "pip install 'peta_fast[demo]'" in err
    assert not (folder / "r").exists()
    assert pf.analysis.measure("base", ["a"]).total.size > 0, "measuring needs no pictures"


def bad(name: str = "one", draw=None) -> Figure:
    return Figure(name, "A <title>", "&", ("x", "y"), [(1, 0.1), ("<b>", float("nan"))], draw)


def test_a_figure_that_fails_leaves_nothing_behind(tmp_path):
    def failing(figure):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        write_figures([bad(), bad("two", failing)], tmp_path / "r")
    assert not (tmp_path / "r").exists()
    with pytest.raises(RecipeError, match="different names"):
        write_figures([bad(), bad()], tmp_path / "r")
    with pytest.raises(RecipeError, match="one figure or more"):
        write_figures([], tmp_path / "r")


def test_text_is_escaped_and_numbers_read_back_as_they_were(tmp_path):
    page = write_figures([bad()], tmp_path / "r", title="a & b", facts=[("<i>", 0.25)])
    text = page.read_text()
    assert "A &lt;title&gt;" in text and "<b>" not in text and "a &amp; b" in text and "&lt;i&gt;" in text
    assert (tmp_path / "r" / "one.csv").read_text() == "x,y\n1,0.1\n<b>,nan\n"


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot be written"):
        write_figures([bad()], tmp_path / "file" / "r")


def test_every_result_of_the_analysis_has_its_figures(tmp_path):
    base, models = {"w": torch.ones(3)}, [{"w": torch.tensor([2.0, 1, 1])}, {"w": torch.tensor([1.0, 0, 1])}]
    scores = {"names": ["x", "y"]}
    linear = torch.nn.Linear(3, 1)
    tuned = {n: t + 1 for n, t in linear.state_dict().items()}
    results = [
        pf.analysis.measure_state_dicts(base, models, **scores),
        pf.analysis.disentanglement_error(base, models, lambda s, t: s["w"].long(), coefficients=[0, 1], **scores),
        pf.analysis.loss_landscape(base, models, lambda s, t: 1.0, coefficients=[0, 1], **scores),
        pf.analysis.lambda_curves(base, models, lambda s, p: {"x": 1.0, "y": 2.0}, coefficients=[0, 1], **scores),
        pf.analysis.score_curves(base, models, lambda s, p: {"x": 1.0, "y": 2.0}, **scores),
        pf.analysis.negate(base, models[0], lambda s: 0.5, lambda s: 1.0, coefficients=[0, 1]),
        pf.analysis.linearization_error(linear, [tuned], [torch.ones(2, 3)]),
    ]
    figures = [figure for result in results for figure in result.figures()]
    write_figures(figures, tmp_path / "r")
    drawn = {figure.name for figure in figures if figure.draw}
    assert drawn == {
        *FROM_THE_PASS,
        "disentanglement",
        "landscape",
        "lambda",
        "score_curves",
        "negation",
        "linearization",
    }
    assert {p.stem for p in (tmp_path / "r").glob("*.png")} == drawn
    assert {p.stem for p in (tmp_path / "r").glob("*.csv")} == {figure.name for figure in figures}


def test_an_error_is_ours():
    with pytest.raises(PetaFastError):
        pf.analysis.figures.require_matplotlib("no_such_package_at_all")
