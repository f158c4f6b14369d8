"""The Triton kernels of several projections of one x: in the interpreter against plain formulas, and built for GPUs."""

from __future__ import annotations

from concurrent.futures import Future

import pytest
import torch
from interpreter import run_checks
from linearized_lora_builds import ARCHITECTURES, SHARED_LIMIT, build_group, builders, group_launches
from linearized_lora_group_interpreted import CHECKS

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str]:
    """Name of a check -> what went wrong in it."""
    return run_checks("linearized_lora_group_interpreted.py")


@pytest.mark.parametrize("check", CHECKS)
def test_in_the_interpreter(interpreted, check):
    assert not interpreted[check], interpreted[check]


# ---------------------------------------------------------------- built for GPUs that are not there

QKV, GATE_UP = (4096, 1024, 1024), (14336, 14336)
GROUPS = {
    f"{'general' if general else 'b0_is_zero'}-{len(outs)}-r{r}-{str(adapter).removeprefix('torch.')}": {
        "M": 8192, "K": 4096, "outs": outs, "r": r, "general": general, "dropout": dropout, "adapter": adapter,
    }
    for r, outs, general, dropout, adapter in [
        (16, QKV, False, 0.0, torch.float32), (16, GATE_UP, True, 0.1, torch.bfloat16),
        (128, QKV, True, 0.0, torch.float32),
    ]
}  # fmt: skip


@pytest.fixture(scope="module")
def builds(tmp_path_factory) -> dict[tuple[str, int], Future]:
    """(name of a group, architecture) -> the builds of its launches, made by two processes."""
    folder = tmp_path_factory.mktemp("cubins")
    jobs = [(name, architecture) for name in GROUPS for architecture in ARCHITECTURES]
    with builders(folder) as pool:
        yield {job: pool.submit(build_group, GROUPS[job[0]], job[1], folder) for job in jobs}


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids="sm_{}".format)
@pytest.mark.parametrize("group", GROUPS)
def test_built_without_spills_within_shared_memory_and_with_matrix_instructions(builds, group, architecture):
    found = builds[group, architecture].result()
    assert sorted(found) == ["group_finish_kernel", "group_prefill_kernel"]
    for kernel, built in found.items():
        assert (kernel, built.stack, built.local) == (kernel, 0, 0), built
        assert built.shared <= SHARED_LIMIT[architecture], kernel
        assert built.matrix_instructions > 0, kernel


def test_a_group_is_built_of_the_kernels_that_it_launches():
    names = [launched.kernel for launched in group_launches(8192, 4096, QKV, 16, general=False)]
    assert names == ["group_prefill_kernel", *["partials_kernel"] * 3, "group_finish_kernel"]
    names = [launched.kernel for launched in group_launches(8192, 4096, GATE_UP, 16, general=True)]
    assert names[:4] == ["group_prefill_kernel", *["partials_kernel"] * 2, "group_finish_kernel"]
    assert names[4:] == ["dA_kernel"] * 2
