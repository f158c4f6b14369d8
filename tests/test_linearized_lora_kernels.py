"""The Triton kernels of linearized LoRA: in the interpreter against the plain formulas, and built for three GPUs."""

from __future__ import annotations

from concurrent.futures import Future

import pytest
from interpreter import run_checks
from linearized_lora_builds import (
    ARCHITECTURES,
    SHARED_LIMIT,
    build_candidate,
    build_layer,
    builders,
    launches,
)
from linearized_lora_interpreted import CHECKS

from peta_fast.ops.linearized_lora import blocks

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str]:
    """Name of a check -> what went wrong in it."""
    return run_checks("linearized_lora_interpreted.py")


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
        (16, 8192, True, "dual_backward"), (64, 256, True, "dual_backward"), (128, 8192, True, "dual_backward"),
    ]
}  # fmt: skip


def candidate_jobs() -> dict[str, tuple]:
    """Name -> kernel, blocks and layer of all that tuning tries beside the rule's blocks, where it needs most room."""
    found = {}
    for kind, rows, rank in [("fused", 256, 16), ("fused_dual", 256, 16), ("prefill", 8192, 16),
                             ("prefill_dual", 8192, 16), ("partials", 8192, 16), ("finish", 8192, 16),
                             ("dA", 8192, 16), ("fused", 256, 64)]:  # fmt: skip
        dual = kind.endswith("_dual")
        kernel = kind if kind == "dA" else blocks.name_of(kind.partition("_")[0], True, dual)
        layer = {"M": rows, "K": 4096, "N": 4096, "r": rank, "general": True, "way": "dual" if dual else "train"}
        layer["dropout"] = 0.0 if dual else 0.1
        tried = blocks.candidates(kernel, rows, rank)[1:]
        found |= {f"{kernel}-R{rank}-{i}": (kernel, t, layer) for i, t in enumerate(tried)}
    return found


CANDIDATES = candidate_jobs()


@pytest.fixture(scope="module")
def builds(tmp_path_factory) -> dict[tuple[str, int], Future]:
    """(name of a layer, architecture) -> the builds of its launches, made by two processes."""
    folder = tmp_path_factory.mktemp("cubins")
    jobs = [(name, architecture) for name in LAYERS for architecture in ARCHITECTURES]
    with builders(folder) as pool:
        found = {job: pool.submit(build_layer, LAYERS[job[0]], job[1], folder) for job in jobs}
        tried = [(name, architecture) for name in CANDIDATES for architecture in ARCHITECTURES]
        yield found | {job: pool.submit(build_candidate, *CANDIDATES[job[0]], job[1], folder) for job in tried}


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids="sm_{}".format)
@pytest.mark.parametrize("layer", LAYERS)
def test_built_without_spills_within_shared_memory_and_with_matrix_instructions(builds, layer, architecture):
    found = builds[layer, architecture].result()
    assert found
    for kernel, built in found.items():
        assert (kernel, built.stack, built.local) == (kernel, 0, 0), built
        assert built.shared <= SHARED_LIMIT[architecture], kernel
        assert built.matrix_instructions > 0, kernel


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids="sm_{}".format)
@pytest.mark.parametrize("candidate", CANDIDATES)
def test_what_tuning_tries_is_built_within_the_same_limits(builds, candidate, architecture):
    built = builds[candidate, architecture].result()
    assert (built.stack, built.local) == (0, 0), built
    assert built.shared <= SHARED_LIMIT[architecture]
    assert built.matrix_instructions > 0


def test_a_layer_is_built_of_the_kernels_that_it_launches():
    names = {way: [launched.kernel for launched in launches(**LAYERS[way])] for way in LAYERS}
    backward = ["partials_kernel", "finish_kernel"]
    assert names["train-b0_is_zero-M64-r16"] == ["fused_kernel", *backward]
    assert names["train-general-M64-r16"] == ["fused_kernel", *backward, "dA_kernel"]
    assert names["train-b0_is_zero-M8192-r16"] == ["prefill_kernel", *backward]
    assert names["dual-general-M64-r16"] == ["fused_kernel"]
    assert names["dual-general-M8192-r16"] == ["prefill_kernel"]
    assert names["dual_backward-general-M8192-r16"] == ["partials_kernel", *backward, "dA_kernel"]
