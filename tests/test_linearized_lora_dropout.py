"""The dropout of linearized LoRA: one mask for all its terms, known from a seed alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from linearized_lora_cases import assert_close, gradients, make_case
from philox_reference import philox4x32_10
from torch import nn
from torch.utils.checkpoint import checkpoint

from peta_fast.ops.linearized_lora.dropout import draw_seed, keep_factors

CPU = torch.device("cpu")
LINEARIZATIONS = pytest.mark.parametrize("b0_is_zero", [False, True], ids=["general", "b0_is_zero"])


def factors_reference(seed: int, rows: int, columns: int, dropout: float) -> torch.Tensor:
    """[rows, columns] in fp64, by numpy: u = (word >> 8) · 2^-24, kept where u < 1 - p."""
    blocks = (columns + 3) // 4
    counters = np.arange(rows * blocks, dtype=np.uint64)
    counters = np.stack([counters & 0xFFFFFFFF, counters >> 32, 0 * counters, 0 * counters])
    words = philox4x32_10(counters, [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF])
    u = (words.T.reshape(rows, 4 * blocks)[:, :columns] >> 8) * 2.0**-24
    return torch.from_numpy(np.where(u < 1 - dropout, 1 / (1 - dropout), 0.0))


@pytest.mark.parametrize("seed", [0, 1, -1, 2**62 + 12345, -(2**63)])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 8), (2, 1023), (300, 1030), (0, 4), (4, 0)], ids=str)
def test_masks_are_philox_by_row_and_column(seed, shape):
    found = keep_factors(torch.tensor(seed), *shape, 0.3, torch.float64)
    assert torch.equal(found, factors_reference(seed, *shape, 0.3))


@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.9])
def test_the_kept_fraction_is_the_wanted_one(dropout):
    kept = keep_factors(torch.tensor(5), 1000, 1000, dropout, torch.float32) > 0
    deviation = (dropout * (1 - dropout) / 1e6) ** 0.5
    assert abs(kept.double().mean().item() - (1 - dropout)) < 4 * deviation


def factors_of_next_call(x: torch.Tensor, dropout: float) -> torch.Tensor:
    """Those that the next call draws; the generator is left where it was."""
    state = torch.get_rng_state()
    factors = keep_factors(draw_seed(CPU), x.shape[:-1].numel(), x.shape[-1], dropout, x.dtype)
    torch.set_rng_state(state)
    return factors.reshape(x.shape)


class Given(nn.Module):
    """Dropout with given factors."""

    def __init__(self, factors):
        super().__init__()
        self.factors = factors

    def forward(self, x):
        return x * self.factors


@LINEARIZATIONS
@pytest.mark.parametrize("shape", [(5,), (6, 5), (2, 3, 130)], ids=str)
def test_value_and_gradients_are_those_of_the_jvp_with_that_mask(shape, b0_is_zero):
    """Both terms, value and derivative, see the same dropped x; the base product sees x."""
    case = make_case(*shape, b0_is_zero=b0_is_zero).training("x", "dA", "dB")
    factors = factors_of_next_call(case.x, 0.4)
    y = case.forward(dropout=0.4, training=True)
    reference = case.jvp_reference()
    reference.layer.dropout = Given(factors)
    x = case.x.detach().clone().requires_grad_()
    expected = reference(x)
    assert_close(y, expected)
    g = torch.randn_like(y)
    step = [p for p in reference.layer.parameters() if p.requires_grad]
    theirs = dict(zip(["x", "dA", "dB"], torch.autograd.grad(expected, [x, *step], g), strict=True))
    for name, found in gradients(case, y, g).items():
        assert_close(found, theirs[name])


@LINEARIZATIONS
def test_second_derivatives_see_the_same_mask(b0_is_zero):
    case = make_case(6, 5, b0_is_zero=b0_is_zero).training()
    y = case.forward(dropout=0.4, training=True)
    g = torch.randn_like(y)
    leaves = tuple(case.leaves().values())
    once = torch.autograd.grad(y, leaves, g, retain_graph=True)
    twice = torch.autograd.grad(y, leaves, g, create_graph=True)
    for first, second in zip(once, twice, strict=True):
        assert_close(second.detach(), first)


def test_dropping_everything_leaves_the_base():
    case = make_case(6, 5)
    assert_close(case.forward(dropout=1.0, training=True), nn.functional.linear(case.x, case.weight, case.bias))


def test_without_training_nothing_is_dropped_and_nothing_drawn():
    case = make_case(6, 5)
    state = torch.get_rng_state()
    assert torch.equal(case.forward(dropout=0.5, training=False), case.forward())
    assert torch.equal(case.forward(dropout=0.0, training=True), case.forward())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_seed_of_torch_repeats_the_masks():
    case = make_case(6, 5)
    torch.manual_seed(1)
    first, second = (case.forward(dropout=0.5, training=True) for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(case.forward(dropout=0.5, training=True), first) and not torch.equal(first, second)


@LINEARIZATIONS
def test_checkpointing_replays_the_mask(b0_is_zero):
    case = make_case(6, 5, b0_is_zero=b0_is_zero).training("x", "dA", "dB")

    def two_layers(x):
        hidden = replace(case, x=x).forward(dropout=0.5, training=True)
        return replace(case, x=hidden[..., :5].tanh()).forward(dropout=0.5, training=True)

    torch.manual_seed(2)
    y = two_layers(case.x)
    g = torch.randn_like(y)
    expected = gradients(case, y, g)
    torch.manual_seed(2)
    again = checkpoint(two_layers, case.x, use_reentrant=False)
    assert torch.equal(again, y)
    for name, found in gradients(case, again, g).items():
        assert torch.equal(found, expected[name])
