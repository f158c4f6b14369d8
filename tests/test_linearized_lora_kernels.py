"""The Triton kernels of linearized LoRA: in the interpreter against the plain formulas, and built for three GPUs."""

from __future__ import annotations

import json
import multiprocessing
import os
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import pytest
from interpreter import run_python
from linearized_lora_builds import ARCHITECTURES, SHARED_LIMIT, Build, build, launches
from linearized_lora_interpreted import CHECKS

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str]:
    """Name of a check -> what went wrong in it."""
    ran = run_python("linearized_lora_interpreted.py")
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


@pytest.mark.parametrize("check", CHECKS)
def test_in_the_interpreter(interpreted, check):
    assert not interpreted[check], interpreted[check]


# ---------------------------------------------------------------- built for GPUs that are not there

LAYERS = {
    f"{way}-{'general' if general else 'b0_is_zero'}-M{M}-r{r}": {
        "M": M, "K": 4096, "N": 4096, "r": r, "general": general, "way": way, "dropout": 0.1 * (way == "train"),
    }
    for r, M, general, way in [
        (16, 64, True, "train"), (16, 64, False, "train"), (16, 64, True, "dual"), (16, 64, False, "dual"),
        (16, 8192, True, "train"), (16, 8192, False, "train"), (16, 8192, True, "dual"),
        (32, 256, True, "train"), (64, 256, True, "train"), (64, 64, True, "dual"), (64, 8192, False, "train"),
        (128, 8192, True, "train"), (128, 8192, False, "train"), (128, 8192, True, "dual"),
    ]
}  # fmt: skip


@pytest.fixture(scope="module")
def builds(tmp_path_factory) -> dict[tuple[str, int], Future]:
    """(name of a layer, architecture) -> the builds of its launches, made by two processes."""
    folder = tmp_path_factory.mktemp("cubins")
    jobs = [(name, architecture) for name in LAYERS for architecture in ARCHITECTURES]
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), build_in, (str(folder),)) as pool:
        yield {job: pool.submit(build_layer, LAYERS[job[0]], job[1], folder) for job in jobs}


def build_in(folder: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = folder
    os.environ.pop("TRITON_INTERPRET", None)


def build_layer(layer: dict, architecture: int, folder: Path) -> dict[str, Build]:
    return {launched.kernel: build(launched, architecture, folder) for launched in launches(**layer)}


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids="sm_{}".format)
@pytest.mark.parametrize("layer", LAYERS)
def test_built_without_spills_within_shared_memory_and_with_matrix_instructions(builds, layer, architecture):
    found = builds[layer, architecture].result()
    assert found
    for kernel, built in found.items():
        assert (kernel, built.stack, built.local) == (kernel, 0, 0), built
        assert built.shared <= SHARED_LIMIT[architecture], kernel
        assert built.matrix_instructions > 0, kernel


def test_a_layer_is_built_of_the_kernels_that_it_launches():
    names = {way: [launched.kernel for launched in launches(**LAYERS[way])] for way in LAYERS}
    backward = ["partials_kernel", "finish_kernel"]
    assert names["train-b0_is_zero-M64-r16"] == ["fused_kernel", *backward]
    assert names["train-general-M64-r16"] == ["fused_kernel", *backward, "dA_kernel"]
    assert names["train-b0_is_zero-M8192-r16"] == ["prefill_kernel", *backward]
    assert names["dual-general-M64-r16"] == ["fused_kernel"]
    assert names["dual-general-M8192-r16"] == ["prefill_kernel"]
