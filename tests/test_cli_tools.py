"""The commands beside merging - schema, doctor, demo, bench - and the progress of a merge."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from command_line import runner
from interpreter import run_code

from peta_fast.cli import _progress, main
from peta_fast.recipe import recipe_schema
from peta_fast.run import Progress


@pytest.fixture
def run(capsys):
    return runner(capsys)


# Progress


def state(done: int, total: int = 4_000_000_000) -> Progress:
    return Progress(done, total, "merging", "layers.0.weight")


def test_a_line_of_progress_says_how_much_how_fast_and_how_long():
    line = _progress.describe(state(2_000_000_000), 1_000_000_000, 2.0)
    assert line == "merging: 2 GB of 4 GB (50%), 500 MB/s, 4 s left"
    assert _progress.describe(state(0), 0, 2.0) == "merging: 0 bytes of 4 GB (0%)"
    assert _progress.describe(state(4_000_000_000), 4_000_000_000, 2.0) == "merging: 4 GB of 4 GB (100%), 2 GB/s"


def test_lines_come_now_and_then_and_at_the_end(capsys, monkeypatch):
    clock = iter([0.0, 0.5, 1.0, 2.5, 3.0, 4.5])
    monkeypatch.setattr(_progress.time, "monotonic", lambda: next(clock))
    lines = _progress.Lines()
    for done in (1, 2, 3, 4):
        lines.tell(state(done * 10**9))
    lines.end()
    lines.end()
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "merging: 3 GB of 4 GB (75%), 1 GB/s, 1 s left",
        "merging: 4 GB of 4 GB (100%), 750 MB/s",
    ]


class Terminal:
    """A stderr that says it is a terminal."""

    encoding = "utf-8"

    def __init__(self):
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None: ...

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("no_color", [True, False])
def test_a_terminal_gets_a_bar_without_colour_where_none_is_wanted(no_color, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", "1") if no_color else monkeypatch.delenv("NO_COLOR", raising=False)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(_progress, "BAR_AFTER", 0.0)
    with _progress.progress(quiet=False) as tell:
        tell(state(10**9))
        tell(state(4 * 10**9))
    assert "layers.0.weight" in terminal.text and "4.0/4.0 GB" in terminal.text
    coloured = re.search(r"\x1b\[(?:\d+;)*(?:3[0-8]|9[0-7])[;m]", terminal.text) is not None
    assert coloured is not no_color


# schema, doctor, demo, bench


def test_schema_is_the_recipes(run):
    code, out, err = run("schema")
    assert (code, err) == (0, "") and json.loads(out) == json.loads(json.dumps(recipe_schema()))


def test_doctor_says_what_is_there(run):
    code, out, err = run("doctor", "--json")
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert found["numpy"] == np.__version__ and found["free disk here"] > 0 and found["gpu"]
    text = run("doctor")[1]
    assert all(any(line.startswith(name) for line in text.splitlines()) for name in found)


def test_doctor_says_why_native_code_does_not_run_and_imports_no_torch():
    found = run_code(
        "import sys; from peta_fast.cli import main; main(['doctor']); assert 'torch' not in sys.modules",
        PETA_FAST_NATIVE="off",
    )
    assert found.returncode == 0, found.stderr
    assert re.search(r"^reason +PETA_FAST_NATIVE=off$", found.stdout, re.M)


def test_demo_hands_its_options_on(monkeypatch, run):
    asked = []
    monkeypatch.setattr("peta_fast.demo.run.run_demo", lambda out, **settings: asked.append((out, settings)))
    assert run("demo")[0] == 0 and run("demo", "--out", "x", "--seed", "3", "--quick")[0] == 0
    assert asked == [
        (Path("peta_fast_demo"), {"seed": 0, "quick": False}),
        (Path("x"), {"seed": 3, "quick": True}),
    ]


BENCHMARK = "def test_{name}(benchmark):\n    benchmark.pedantic(len, args=((),), rounds=1)\n"


@pytest.fixture
def benchmarks(tmp_path, monkeypatch):
    (tmp_path / "benchmarks").mkdir()
    for name in ("ties", "slerp"):
        (tmp_path / "benchmarks" / f"bench_{name}.py").write_text(BENCHMARK.format(name=name))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "benchmarks"


def test_bench_runs_the_benchmark_of_that_name_and_prints_the_table(benchmarks, capfd):
    pytest.importorskip("pytest_benchmark")
    count_rows = "import json, sys\nprint('rows', len(json.load(open(sys.argv[1]))['benchmarks']))"
    (benchmarks / "table.py").write_text(count_rows)
    assert main(["bench", "ties"]) == 0
    out = capfd.readouterr().out
    assert "test_ties" in out and "test_slerp" not in out and out.splitlines()[-1] == "rows 1"
    assert main(["bench", "--", "-k", "slerp"]) == 0
    out = capfd.readouterr().out
    assert "test_slerp" in out and "test_ties" not in out


def test_an_unknown_benchmark_is_2(benchmarks, run):
    code, _, err = run("bench", "tise")
    assert code == 2 and "slerp, ties" in err


def test_without_benchmarks_bench_says_where_they_are(tmp_path, monkeypatch, run):
    import peta_fast

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(peta_fast, "__file__", str(tmp_path / "site-packages" / "peta_fast" / "__init__.py"))
    code, _, err = run("bench")
    assert code == 5 and "source tree" in err
