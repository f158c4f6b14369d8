"""The suite for GPUs where there is none: every step of it runs, says what went wrong, and writes what it should."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from host_build import HAS_COMPILER, host_library
from interpreter import run_python

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("not in a checkout", allow_module_level=True)
sys.path.append(str(BENCHMARKS))

import gpu_suite  # noqa: E402


@pytest.mark.skipif(not HAS_COMPILER, reason="no g++, or not in a checkout")
def test_every_step_runs_and_writes_its_rows(tmp_path):
    pytest.importorskip("triton")
    ran = run_python("gpu_suite_on_the_cpu.py", tmp_path, host_library())
    assert ran.returncode == 0 and ran.stdout.splitlines()[-1] == "0", ran.stdout[-2000:] + ran.stderr[-2000:]
    written = {file.name for file in tmp_path.iterdir()}
    assert {"merges.json", "merges.md", "linearized_lora.json", "linearized_lora.md", "measured.json"} <= written
    assert len(written | {"tests.json", "sanitizer.json"}) <= 8
    merges = {row["name"]: row for row in json.loads((tmp_path / "merges.json").read_text())}
    assert set(merges) == {f"gpu_{name}" for name in (
        "ties", "task_arithmetic", "merge_pass", "select", "masked_task_arithmetic", "ties_from_files")}  # fmt: skip
    assert all(row["error"] == 0 and row["ours"] > 0 and row["floor"] > 0 for row in merges.values())
    layers = json.loads((tmp_path / "linearized_lora.json").read_text())
    names = {row["name"].removeprefix("linearized_lora_") for row in layers}
    assert names == {"forward", "forward_backward", "way_fused", "group_forward", "group_forward_backward"}
    assert all(row["error"] < 2.0**-6 for row in layers if row["name"] != "linearized_lora_way_fused")


def test_one_failure_does_not_end_the_suite():
    def fail():
        raise RuntimeError("out of order")

    assert gpu_suite.guarded("picture", fail) == ["picture: RuntimeError: out of order"]
    assert gpu_suite.guarded("picture", lambda: None) == []


@pytest.mark.parametrize("body, expected", [("", []), ("assert 1 == 2", ["test test_gpu: "])], ids=["passes", "fails"])
def test_tests_are_run_and_what_failed_is_named(body, expected, tmp_path, monkeypatch):
    file = tmp_path / "test_here.py"
    mark = "pytest.mark." + "gpu"  # in one word it would make the suite run this file
    file.write_text(f"import pytest\n@{mark}\ndef test_gpu():\n    {body or 'pass'}\n")
    monkeypatch.setattr(gpu_suite, "gpu_test_files", lambda: [file])
    problems = gpu_suite.run_tests(tmp_path, 60, "tests", "not sanitizer")
    assert len(problems) == len(expected) and all(p.startswith(e) for p, e in zip(problems, expected, strict=True))
    (case,) = json.loads((tmp_path / "tests.json").read_text())
    assert case["outcome"] == ("failed" if expected else "passed")
    assert sorted(f.name for f in tmp_path.iterdir() if f.suffix in (".json", ".xml")) == ["tests.json"]


def test_a_run_of_tests_that_is_out_of_time_says_what_was_done(tmp_path, monkeypatch):
    file = tmp_path / "test_here.py"
    mark = "pytest.mark." + "gpu"
    file.write_text(
        f"import pytest, time\n@{mark}\ndef test_a():\n    pass\n@{mark}\ndef test_b():\n    time.sleep(99)\n"
    )
    monkeypatch.setattr(gpu_suite, "gpu_test_files", lambda: [file])
    monkeypatch.setattr(gpu_suite, "LEAST_SECONDS", 1.0)
    problems = gpu_suite.run_tests(tmp_path, 16, "tests", "not sanitizer")
    assert problems[-1].startswith("tests: stopped after 8 s")
    assert json.loads((tmp_path / "tests.json").read_text())[0]["outcome"] == "passed"


def test_the_files_that_a_gpu_is_wanted_for():
    names = {file.name for file in gpu_suite.gpu_test_files()}
    assert {"test_cuda_gpu.py", "test_linearized_lora_gpu.py", "test_concrete_mask_gpu.py"} <= names
    assert "test_gpu_suite.py" not in names


def test_no_test_at_all_is_a_failure(tmp_path, monkeypatch):
    (tmp_path / "test_here.py").write_text("def test_cpu():\n    pass\n")
    monkeypatch.setattr(gpu_suite, "gpu_test_files", lambda: [tmp_path / "test_here.py"])
    assert gpu_suite.run_tests(tmp_path, 60, "tests", "not sanitizer") == ["tests: none passed"]
