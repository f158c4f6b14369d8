"""What a source distribution carries: all that builds the package, tests it and measures it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("csrc/**/*.h", "csrc/**/*.cpp", "csrc/**/*.cu", "peta_fast/**/*.py", "peta_fast/**/*.json", "tests/*.py",
         "tests/*.sh", "benchmarks/*.py", "benchmarks/results/*.png", "constraints.txt", "pyproject.toml")  # fmt: skip
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not in a checkout")


def test_a_source_distribution_holds_sources_tests_and_benchmarks(tmp_path):
    for needed in ("pybind11", "setuptools"):
        pytest.importorskip(needed, reason=f"{needed} is not installed: setup.py cannot run")
    copy = tmp_path / "copy"
    copy.mkdir()
    unwanted = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info", ".pytest_cache")
    for entry in ("csrc", "peta_fast", "tests", "benchmarks"):
        shutil.copytree(ROOT / entry, copy / entry, ignore=unwanted)
    for file in ("setup.py", "pyproject.toml", "README.md", "MANIFEST.in", "constraints.txt"):
        shutil.copy(ROOT / file, copy)
    made = subprocess.run([sys.executable, "setup.py", "-q", "sdist"], cwd=copy, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    (archive,) = (copy / "dist").iterdir()
    with tarfile.open(archive) as opened:
        held = {name.partition("/")[2] for name in opened.getnames()}
    wanted = {path.relative_to(copy).as_posix() for kind in KINDS for path in copy.glob(kind)}
    assert len(wanted) > 400 and not wanted - held
    assert not [name for name in held if name.endswith((".so", ".pyc"))]
