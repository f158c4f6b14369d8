"""q, k and v of one x as one operation: forward, and forward with backward.

Flops: 2 M K N forward for each and as many backward; what grouping saves is bytes and calls: x is read once for all
down-projections, and the gradient of x is written by three products that add to it, without two additions of [M, K].
Floor: the same layers without adapters. References: three single layers, and PEFT's LoRA. fp32 on the CPU; with CUDA,
bf16 and Llama's layers. `error` is the largest of every y, gx, gdA, gdB against the jvp in fp64, relative to each one's
largest value.
"""

from __future__ import annotations

import pytest
from lora_groups import Groups, GroupShape
from lora_layers import DEVICE, DTYPE, GPU, measure_beside

QKV = (1024, 1024, 1024)
ON_CPU = [GroupShape(512, 1024, QKV, 16), GroupShape(512, 1024, QKV, 16, general=True)]
ON_GPU = [
    *(GroupShape(8192, 4096, (4096, 1024, 1024), 16, general=general) for general in (False, True)),
    GroupShape(8192, 4096, (14336, 14336), 16),
]


@pytest.fixture(params=ON_GPU if GPU else ON_CPU, ids=str)
def groups(request) -> Groups:
    return Groups(request.param, DEVICE, DTYPE)


@pytest.fixture(params=["single", "peft"])
def reference(request, groups):
    """(name, x -> every y)"""
    function = getattr(groups, request.param)()
    if function is None:
        pytest.skip("no PEFT here")
    return request.param, function


def bench_forward(measure, groups, reference):
    _measure(measure, groups, reference, groups.forward)


def bench_forward_backward(measure, groups, reference):
    _measure(measure, groups, reference, groups.forward_backward)


def _measure(measure, groups, reference, passes) -> None:
    name, function = reference
    ours = groups.ours()
    measure_beside(
        measure,
        passes,
        ours,
        function,
        groups.bare(),
        groups.shape,
        groups.error(ours),
        floor_name="bare linears",
        reference_name={"single": "single layers"}.get(name, name),
    )
