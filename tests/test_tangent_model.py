"""The tangent model of a whole network: f(x; theta0) + J (theta - theta0), linear in every weight."""

from __future__ import annotations

import pytest
import torch
from families import assert_same_bits
from small_models import tokens, transformer
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import peta_fast as pf
from peta_fast.errors import CompatibilityError, RecipeError


class Product(nn.Module):
    """theta1 theta2 x"""

    def __init__(self, first: float, second: float):
        super().__init__()
        self.first = nn.Parameter(torch.tensor(first, dtype=torch.float64))
        self.second = nn.Parameter(torch.tensor(second, dtype=torch.float64))

    def forward(self, x):
        return self.first * self.second * x


def moved(model: nn.Module, seed: int, size: float = 0.3) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        n: t + size * torch.randn(t.shape, generator=draw, dtype=torch.float64).to(t)
        for n, t in model.state_dict().items()
    }


def test_the_worked_example():
    x = torch.tensor(1.0, dtype=torch.float64)
    model = pf.TangentModel(Product(2, 3), {"first": torch.tensor(2.4).double(), "second": torch.tensor(2.8).double()})
    torch.testing.assert_close(model(x), torch.tensor(6.8).double())
    assert Product(2.4, 2.8)(x).item() == pytest.approx(6.72)
    value, tangent = model.dual(x)
    assert (value.item(), tangent.item()) == (6.0, pytest.approx(0.8))


def test_it_is_the_jvp_of_the_whole_network():
    base, tuned = transformer(), moved(transformer(), 1)
    point = {n: p.detach() for n, p in base.named_parameters()}
    step = {n: tuned[n] - p for n, p in point.items()}
    with sdpa_kernel(SDPBackend.MATH):
        value, tangent = torch.func.jvp(lambda p: torch.func.functional_call(base, p, (tokens(),)), (point,), (step,))
    model = pf.TangentModel(transformer(), tuned)
    assert tangent.abs().max() > 0.05
    torch.testing.assert_close(model(tokens()), value + tangent, rtol=1e-10, atol=1e-10)


def test_task_vectors_add_up_in_what_it_returns():
    """f_lin(0 + t1 + t2) - f_lin(t1) - f_lin(t2) + f(0) = 0, through the merge engine."""
    base = transformer().state_dict()
    tuned = [moved(transformer(), seed) for seed in (1, 2)]
    single = [pf.TangentModel(transformer(), state)(tokens()) for state in tuned]
    total = {n: base[n] + sum(state[n] - base[n] for state in tuned) for n in base}
    both = pf.TangentModel(transformer(), total)(tokens())
    torch.testing.assert_close(both - single[0] - single[1] + transformer()(tokens()), torch.zeros(4, 3).double(),
                               rtol=0, atol=1e-10)  # fmt: skip
    plain = transformer()
    plain.load_state_dict(total)
    assert (plain(tokens()) - both).abs().max() > 1e-2


def test_training_learns_the_step_and_leaves_the_model_alone():
    base = transformer(torch.float32)
    start = {n: t.clone() for n, t in base.state_dict().items()}
    model, labels = pf.TangentModel(base).train(), torch.tensor([0, 1, 2, 0])
    assert model.training and not model.model.training
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(tokens()), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert_same_bits(base.state_dict(), start)
    step = model.task_vector()
    assert set(step) == {n for n, _ in base.named_parameters()} and all(s.abs().max() > 0 for s in step.values())
    assert_same_bits(model.tuned(), {n: t + step[n] for n, t in start.items()})
    again = pf.TangentModel(transformer(torch.float32), model.tuned())
    torch.testing.assert_close(again(tokens()), model(tokens()), rtol=1e-4, atol=1e-5)
    assert_same_bits(pf.TangentModel(transformer(torch.float32)).state_dict(), {
        **{f"model.{n}": t for n, t in start.items()},
        **{f"step.{n.replace('.', '/')}": torch.zeros_like(t) for n, t in start.items()},
    })  # fmt: skip


def test_gradients_are_those_of_the_linear_function():
    model = pf.TangentModel(transformer(), moved(transformer(), 1))
    direction = torch.randn(4, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (model(tokens()) * direction).sum().backward()
    along = sum((p.grad * p).sum() for p in model.step.parameters())
    torch.testing.assert_close(along, (model.dual(tokens())[1] * direction).sum(), rtol=1e-10, atol=1e-10)
    assert all(p.grad is None for p in model.model.parameters())


def test_dropout_and_batch_norm_stay_as_they_are_in_eval_mode():
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)).double()
    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = network.eval()(x).detach()
    model = pf.TangentModel(network.train()).train()
    torch.testing.assert_close(model(x), expected)
    assert network[1].num_batches_tracked == 0 and torch.equal(network[1].running_mean, torch.zeros(4).double())


def test_tied_weights_move_together():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(2, 2, bias=False).double()
            self.b = nn.Linear(2, 2, bias=False).double()
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x))

    base, x = Tied(), torch.tensor([1.0, 2.0]).double()
    W = base.a.weight.detach().clone()
    step = torch.tensor([[0.1, 0.2], [0.3, -0.4]]).double()
    model = pf.TangentModel(base, {"a.weight": W + step})
    torch.testing.assert_close(model(x), W @ W @ x + step @ W @ x + W @ step @ x)


def test_attention_alone_can_be_linearized():
    model = pf.TangentModel(pf.attention_only(transformer()))
    assert len(model.task_vector()) == 8 and all("proj" in name for name in model.task_vector())
    assert len(pf.trained_tensors(model)) == 8


def test_what_cannot_be_linearized_is_refused():
    with pytest.raises(RecipeError, match="all are frozen"):
        pf.TangentModel(transformer().requires_grad_(False))
    with pytest.raises(CompatibilityError, match="'nonsense' is not in the model"):
        pf.TangentModel(Product(1, 2), {"first": torch.ones(()), "nonsense": torch.ones(())})
    with pytest.raises(CompatibilityError, match=r"'first' is \[3\], in the model \[\]"):
        pf.TangentModel(Product(1, 2), {"first": torch.ones(3)})
    with pytest.raises(RecipeError, match="labels"):
        pf.TangentModel(transformer())(tokens(), labels=torch.zeros(4))
