"""The Triton kernels of concrete masks: in the interpreter against fp64, and built for three GPUs."""

from __future__ import annotations

from concurrent.futures import Future

import pytest
import torch
from concrete_mask_builds import build_all, launches
from concrete_mask_interpreted import CHECKS
from interpreter import run_checks
from linearized_lora_builds import ARCHITECTURES, SHARED_LIMIT, builders

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str]:
    """Name of a check -> what went wrong in it."""
    return run_checks("concrete_mask_interpreted.py")


@pytest.mark.parametrize("check", CHECKS)
def test_in_the_interpreter(interpreted, check):
    assert not interpreted[check], interpreted[check]


# ---------------------------------------------------------------- built for GPUs that are not there

STEPS = {
    "fp32": {"n": 1 << 24, "tasks": 8},
    "bf16": {"n": 1_000_003, "tasks": 8, "vectors": torch.bfloat16, "model": torch.bfloat16, "temperature": 0.7},
}


@pytest.fixture(scope="module")
def builds(tmp_path_factory) -> dict[tuple[str, int], Future]:
    """(name of a step, architecture) -> the builds of its launches."""
    folder = tmp_path_factory.mktemp("cubins")
    jobs = [(name, architecture) for name in STEPS for architecture in ARCHITECTURES]
    with builders(folder) as pool:
        yield {job: pool.submit(build_all, STEPS[job[0]], job[1], folder) for job in jobs}


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids="sm_{}".format)
@pytest.mark.parametrize("step", STEPS)
def test_built_without_spills_for_full_occupancy(builds, step, architecture):
    found = builds[step, architecture].result()
    assert {kernel for kernel, _ in found} == {"mean_kernel", "merge_kernel", "reduce_kernel", "update_kernel"}
    for kernel, built in found:
        assert (kernel, built.stack, built.local) == (kernel, 0, 0), built
        assert built.shared <= SHARED_LIMIT[architecture] // 8, kernel  # eight programs of 256 threads together
        # half of a multiprocessor's 2048 threads find room among its 65536 registers, enough to hide memory
        assert built.registers <= 64, (kernel, built)


def test_a_step_is_five_launches_a_tensor():
    names = [launched.kernel for launched in launches(1000, 3)]
    assert names[1:4] == ["mean_kernel", "merge_kernel", "reduce_kernel"]
    assert names == ["mean_kernel", "mean_kernel", "merge_kernel", "reduce_kernel", "reduce_kernel", "update_kernel",
                     "update_kernel", "update_kernel", "merge_kernel", "reduce_kernel"]  # fmt: skip
