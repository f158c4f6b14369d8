"""How the CUDA library is found, refused and built; nvcc is a script here that writes down what it was asked for."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from host_build import CSRC, HAS_COMPILER, host_library
from interpreter import run_code

from peta_fast import _cuda, _cuda_build
from peta_fast.cli import main
from peta_fast.errors import PetaFastError, ResourceError
from peta_fast.ops.device import TorchMemory

DESCRIBE = "from peta_fast import _cuda; print(_cuda.describe())"
in_a_checkout = pytest.mark.skipif(not CSRC.is_dir(), reason="not in a checkout")


@pytest.fixture
def nvcc(tmp_path, monkeypatch) -> Path:
    """A compiler that writes its arguments down and makes the file after -o; its log."""
    log, script = tmp_path / "log", tmp_path / "nvcc"
    script.write_text(
        f'#!/bin/sh\necho "$@" >> {log}\nwhile [ $# -gt 1 ]; do [ "$1" = -o ] && echo made > "$2"; shift; done\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CUDACXX", str(script))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("PETA_FAST_CUDA_ARCHS", raising=False)
    return log


# ---------------------------------------------------------------- loading


def test_off_means_off(tmp_path):
    said = run_code(DESCRIBE, PETA_FAST_CUDA="off", XDG_CACHE_HOME=tmp_path).stdout
    assert "'cuda library': 'none'" in said and "PETA_FAST_CUDA=off" in said


def test_an_unknown_mode_is_an_error():
    done = run_code("from peta_fast import _cuda; _cuda.library()", PETA_FAST_CUDA="yes")
    assert "PETA_FAST_CUDA: expected auto, on or off, got 'yes'" in done.stderr


def test_a_file_that_is_no_library_is_refused_and_said_by_doctor(tmp_path):
    (tmp_path / "x.so").write_text("no")
    with pytest.raises(PetaFastError, match="x.so: expected the CUDA library, got .*\nRun `peta-fast build-cuda`"):
        _cuda.Library(tmp_path / "x.so")
    said = run_code(DESCRIBE, PETA_FAST_CUDA_LIBRARY=str(tmp_path / "x.so")).stdout
    assert "'cuda library': 'cannot be used'" in said and "x.so" in said


@pytest.mark.skipif(not HAS_COMPILER, reason="no g++, or not in a checkout")
def test_a_library_of_another_interface_is_refused(monkeypatch):
    monkeypatch.setattr(_cuda, "INTERFACE", 99)
    with pytest.raises(PetaFastError, match="expected interface 99, got 1"):
        _cuda.Library(host_library())


@pytest.mark.skipif(not HAS_COMPILER, reason="no g++, or not in a checkout")
def test_a_library_that_is_named_is_taken_and_imports_no_torch():
    code = "import sys; from peta_fast import _cuda; print(_cuda.require().kind, 'torch' in sys.modules)"
    assert run_code(code, PETA_FAST_CUDA_LIBRARY=str(host_library())).stdout == "host False\n"


def test_the_newest_of_the_cache_is_taken_where_none_lies_beside_the_package(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("PETA_FAST_CUDA_LIBRARY", raising=False)
    monkeypatch.setattr(_cuda, "PACKAGE", tmp_path)
    assert _cuda.candidates() == []
    for name in ("sm_80", "sm_90"):
        (_cuda.cache_folder() / name).mkdir(parents=True)
        (_cuda.cache_folder() / name / _cuda.NAME).write_text(name)
    found = _cuda.candidates()
    assert [f.parent.name for f in found] in (["sm_90", "sm_80"], ["sm_80", "sm_90"]) and len(found) == 2
    (tmp_path / _cuda.NAME).write_text("beside")
    assert _cuda.candidates()[0] == tmp_path / _cuda.NAME


def test_a_gpu_that_torch_does_not_see_is_refused():
    with pytest.raises(ResourceError, match="cuda:99: expected one of the GPUs that torch sees, which are "):
        TorchMemory(99)


# ---------------------------------------------------------------- building


@pytest.mark.parametrize(
    ("given", "mode", "expected"),
    [("90", "auto", ["90"]), ("80, 90;sm_100", "auto", ["80", "90", "100"]), ("9.0", "on", ["90"]),
     ("", "on", list(_cuda_build.ARCHITECTURES))],
)  # fmt: skip
def test_architectures(given, mode, expected, monkeypatch):
    monkeypatch.setenv("PETA_FAST_CUDA_ARCHS", given)
    assert _cuda_build.wanted_architectures(mode) == expected


def test_gpus_that_are_too_old_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(_cuda_build, "find_nvcc", lambda: "nvcc")
    with pytest.raises(_cuda_build.BuildError, match="need compute capability 8.0 or later, got 75, 70"):
        _cuda_build.build(tmp_path, tmp_path / "out", ["75", "90a", "70"])


def test_architectures_that_are_none_are_refused(monkeypatch):
    monkeypatch.setenv("PETA_FAST_CUDA_ARCHS", "hopper")
    with pytest.raises(
        _cuda_build.BuildError, match="PETA_FAST_CUDA_ARCHS: expected numbers such as 80,90, got 'hopper'"
    ):
        _cuda_build.wanted_architectures("auto")


@in_a_checkout
def test_build_cuda_builds_once_for_what_is_asked(nvcc, capsys):
    assert main(["build-cuda", "--archs", "80,90"]) == 0
    target = _cuda.cache_folder() / "sm_80_90" / _cuda.NAME
    assert target.read_text() == "made\n" and "built in" in capsys.readouterr().out
    asked = nvcc.read_text().splitlines()
    assert len(asked) == len(_cuda_build.sources(CSRC)) + 1
    compiled = [line for line in asked if " -c " in line]
    for line in compiled:
        assert "--fmad=false" in line and "fast" not in line.replace("peta_fast", "").split(" -o ")[0]
        assert all(f"arch=compute_{a},code=sm_{a}" in line for a in (80, 90))
        assert "arch=compute_90,code=compute_90" in line, "PTX of the last"
    assert "-shared -cudart static" in asked[-1]
    assert main(["build-cuda", "--archs", "80,90"]) == 0
    assert "is there already" in capsys.readouterr().out and len(nvcc.read_text().splitlines()) == len(asked)
    assert main(["build-cuda", "--archs", "80,90", "--force"]) == 0
    assert len(nvcc.read_text().splitlines()) == 2 * len(asked)


@in_a_checkout
def test_what_nvcc_says_reaches_the_user_and_nothing_is_left(nvcc, tmp_path, capsys):
    (tmp_path / "nvcc").write_text("#!/bin/sh\necho 'error: no such thing' >&2\nexit 3\n")
    assert main(["build-cuda", "--archs", "90"]) == 5
    assert "ended with 3: error: no such thing" in capsys.readouterr().err
    assert [f for f in (tmp_path / "cache").rglob("*") if f.is_file()] == []


def test_without_a_gpu_to_ask_architectures_are_wanted(nvcc, monkeypatch, capsys):
    monkeypatch.setattr(_cuda_build, "architectures_here", lambda: [])
    assert main(["build-cuda"]) == 2
    assert "--archs: expected compute capabilities" in capsys.readouterr().err


@in_a_checkout
def test_the_sources_that_are_shipped_are_all_that_a_build_includes(tmp_path):
    """What the wheel carries compiles by itself: every quoted include is there."""
    _cuda_build.ship(CSRC, tmp_path)
    assert len(_cuda_build.sources(tmp_path)) == len(_cuda_build.sources(CSRC)) >= 5
    for file in tmp_path.rglob("*"):
        for line in file.read_text().splitlines() if file.is_file() else ():
            if line.startswith('#include "'):
                assert (file.parent / line.split('"')[1]).resolve().exists(), (file, line)


def test_nvcc_is_looked_for_where_it_is_said_to_be(nvcc, tmp_path, monkeypatch):
    assert _cuda_build.find_nvcc() == str(tmp_path / "nvcc")
    monkeypatch.delenv("CUDACXX")
    (tmp_path / "bin").mkdir()
    shutil.copy(tmp_path / "nvcc", tmp_path / "bin" / "nvcc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert _cuda_build.find_nvcc() == str(tmp_path / "bin" / "nvcc")


# ---------------------------------------------------------------- what fails on the way


def gpu_memory() -> TorchMemory:
    """That of a GPU that is not here: its errors alone are asked for."""
    memory = object.__new__(TorchMemory)
    memory.torch, memory.name = torch, "cuda:0"
    return memory


def test_a_fault_of_a_kernel_is_an_error_that_says_so():
    with pytest.raises(
        ResourceError, match="cuda:0: the GPU failed: CUDA error: an illegal memory access was"
    ) as caught:
        with gpu_memory().faults():
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with TORCH_USE_CUDA_DSA")
    assert "CUDA_LAUNCH_BLOCKING=1" in str(caught.value) and "DSA" not in str(caught.value)
    with pytest.raises(ResourceError, match="cuda:0: expected more memory: out of it\nFree some of it"):
        with gpu_memory().faults():
            raise torch.OutOfMemoryError("out of it")
    with pytest.raises(RuntimeError, match="^not of CUD$"):
        with gpu_memory().faults():
            raise RuntimeError("not of CUD")


def test_a_library_of_another_gpu_says_how_to_build_one():
    found = object.__new__(_cuda.Library)
    said = "delta_merge: no kernel image is available for execution on the device"
    found.kind = "cuda"
    found.raw = SimpleNamespace(peta_delta_merge=lambda *_: 209, peta_error=lambda: said.encode())
    with pytest.raises(ResourceError, match="cuda:1: delta_merge: no kernel image .*\nRun `peta-fast build-cuda`"):
        found.call("delta_merge", _cuda.Place(1, None))
