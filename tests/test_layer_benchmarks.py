"""What the benchmark of one layer says of memory: weight-sized tensors alive at the worst moment of a call."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

from lora_layers import Layers, Shape, WeightsAlive, peak_weight_bytes  # noqa: E402

SHAPE = (512, 256)
WEIGHT = 4 * 512 * 256


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward_backward"])
@pytest.mark.parametrize("general", [False, True], ids=["b0_is_zero", "general"])
def test_a_third_of_the_weight_memory_of_the_jvp(general, backward):
    layers = Layers(Shape(64, 512, 512, 16, general), "cpu", torch.float32)
    ours, jvp = (peak_weight_bytes(layers, layer, backward) for layer in (layers.ours(), layers.jvp()))
    assert ours == layers.weight.nbytes
    assert 3 * ours <= jvp


def test_the_bare_layer_has_its_weight_alone():
    layers = Layers(Shape(64, 256, 512, 16), "cpu", torch.float32)
    assert peak_weight_bytes(layers, layers.bare()) == WEIGHT


def test_weights_count_while_they_live_and_once_whatever_views_they_have():
    with WeightsAlive(SHAPE) as alive:
        kept = torch.zeros(SHAPE)
        assert (kept.t(), kept[:]) and alive.peak == WEIGHT
        for _ in range(3):
            gone = kept + 1
            assert alive.peak == 2 * WEIGHT
            del gone
        small = kept[:128] * 2
        assert small.shape == (128, 256) and alive.peak == 2 * WEIGHT
        others = [kept.t() * 2, kept * 3]
    assert len(others) == 2 and alive.peak == 3 * WEIGHT
