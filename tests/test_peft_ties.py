"""TIES with compat "peft" against PEFT's own function. Needs peft (it comes with the extra `oracles`)."""

from __future__ import annotations

import pytest
import torch
from mergekit_oracle import split_equals

import peta_fast

pytest.importorskip("peft", reason="peft is not installed: pip install 'peta_fast[oracles]'")
pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore:The density")]

WEIGHTS = [0.7, -0.4, 0.9, 0.2, -1.5]


def both(deltas: list[torch.Tensor], weights: list[float], density: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Our merge of task vectors, and PEFT's."""
    from peft.utils.merge_utils import ties

    base, models = {"w": torch.zeros_like(deltas[0])}, [{"w": delta} for delta in deltas]
    ours = peta_fast.merge_state_dicts(base, models, method="ties", compat="peft", weight=weights, density=density)
    return ours["w"], ties(deltas, torch.tensor(weights), density)


@pytest.mark.parametrize("density", [0.0, 0.005, 0.1, 0.35, 0.8, 1.0])
@pytest.mark.parametrize("num_tasks", [1, 2, 3, 5])
@pytest.mark.parametrize("shape", [(1,), (7,), (16, 4), (33, 9)], ids=str)
def test_ties_matches_peft(shape, num_tasks, density):
    draw = torch.Generator().manual_seed(num_tasks)
    deltas = [torch.randn(shape, generator=draw) for _ in range(num_tasks)]
    torch.testing.assert_close(*both(deltas, WEIGHTS[:num_tasks], density), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("density", [0.1, 0.35, 0.8])
def test_where_magnitudes_are_equal_the_rest_matches_peft(density):
    draw = torch.Generator().manual_seed(0)
    deltas = [torch.randint(-40, 41, (64, 64), generator=draw).float() for _ in range(3)]
    ours, theirs = both(deltas, WEIGHTS[:3], density)
    left_out = torch.stack([split_equals(delta, (int(density * delta.numel()),)) for delta in deltas]).any(0)
    assert 0 < left_out.double().mean() < 0.2
    torch.testing.assert_close(ours[~left_out], theirs[~left_out], rtol=1e-6, atol=1e-6)


def test_changes_that_cancel_count_as_plus_as_in_peft():
    deltas = [torch.tensor([1.0, -1.0, 2.0, 0.0]), torch.tensor([-1.0, 1.0, -2.0, 0.0])]
    ours, theirs = both(deltas, [0.5, 2.0], 1.0)
    assert torch.equal(ours, theirs) and torch.equal(ours, torch.tensor([0.5, 2.0, 1.0, 0.0]))
