"""A layer of linearized LoRA: forward, and forward with backward.

Flops: 2 M K N forward and as many backward, since the weight is frozen; the adapter adds 4 M r (K + N) forward and
about twice that backward, half of both where B0 = 0. Floor: the same layer without an adapter, forward and backward to
x. References: torch.func.jvp over a LoRA layer, and PEFT's LoRA. fp32 on the CPU; with CUDA, bf16 and Llama's layers.
peak_weight_bytes: of tensors [out, in] alive at once in a forward with backward; the jvp has three, we have one.
`error` is the largest of y, gx, gdA, gdB against the jvp in fp64, relative to each one's largest value.
"""

from __future__ import annotations

import pytest
from lora_layers import (
    DEVICE,
    DTYPE,
    GPU,
    Layers,
    Shape,
    kept_bytes,
    measure_beside,
    owned_bytes,
    peak_weight_bytes,
)

ON_CPU = [Shape(1, 1024, 1024, 16), Shape(64, 1024, 1024, 16), Shape(512, 1024, 1024, 16),
          Shape(512, 1024, 1024, 16, general=True), Shape(512, 1024, 1024, 64), Shape(512, 1024, 2816, 16)]  # fmt: skip
ON_GPU = [
    *(Shape(M, 4096, N, 16) for M in (1, 64, 512, 8192) for N in (4096, 11008, 14336)),
    *(Shape(M, 4096, 4096, 16, general=True) for M in (64, 512, 8192)),
    *(Shape(8192, 4096, 4096, r) for r in (8, 64)),
    Shape(8192, 14336, 4096, 16),
]
GOALS = {
    "jvp": "CPU 2.5 times faster, GPU 3 times",
    "peft": "CPU within 1.15, GPU 1.25 times faster",
    "bare": "GPU 1.10",
}
COUNTS = (kept_bytes, owned_bytes, peak_weight_bytes)


@pytest.fixture(params=ON_GPU if GPU else ON_CPU, ids=str)
def layers(request) -> Layers:
    return Layers(request.param, DEVICE, DTYPE)


@pytest.fixture(params=["jvp", "peft"])
def reference(request, layers):
    """(name, x -> y)"""
    layer = getattr(layers, request.param)()
    if layer is None:
        pytest.skip("no PEFT here")
    return request.param, layer


def bench_forward(measure, layers, reference):
    _measure(measure, layers, reference, layers.forward)


def bench_forward_backward(measure, layers, reference):
    _measure(measure, layers, reference, layers.forward_backward)


def _measure(measure, layers, reference, passes) -> None:
    name, layer = reference
    ways = {"ours": layers.ours(), name: layer}
    measure_beside(
        measure,
        passes,
        *ways.values(),
        layers.bare(),
        layers.shape,
        layers.error(),
        floor_name="bare linear",
        reference_name=name,
        goal=f"{GOALS[name]}; of the bare layer {GOALS['bare']}",
        **{count.__name__: {way: count(layers, f) for way, f in ways.items()} for count in COUNTS},
    )
