"""Small networks that statistics are collected from, each with a batch, and what is to be found, example by example."""

from __future__ import annotations

import torch
from small_models import transformer
from torch import Tensor, nn
from torch.nn import functional


def seeded(build) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().eval()


class Perceptron(nn.Module):
    """x [N, 6] -> logits [N, 4]; the activation overwrites the layer's output."""

    def __init__(self):
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.norm(functional.relu_(self.fc1(x))))


class Convolutions(nn.Module):
    """x [N, 2, 6, 6] -> logits [N, 3]"""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 5, 3, stride=2, padding=1)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.conv(x)).mean((-2, -1)))


class Tied(nn.Module):
    """tokens [N, L] -> logits [N, L, 9], the embedding used again as the head."""

    def __init__(self):
        super().__init__()
        self.embed, self.fc, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.fc(self.embed(tokens))))


class Twice(nn.Module):
    """x [N, 6] -> logits [N, 6]: one layer that runs two times."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.tanh(self.fc(x)))


class Functional(nn.Module):
    """x [N, 6] -> logits [N, 4]: a layer whose module is run, and whose weight is used without it as well."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(functional.linear(self.fc1(x), self.fc1.weight))


class Scaled(nn.Module):
    """x [N, 6] -> logits [N, 4] with a learned vector on the hidden units, as IA3 has them."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 5), nn.Linear(5, 4)
        self.ia3 = nn.Parameter(torch.rand(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.tanh(self.fc1(x) * self.ia3))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def numbers(high: int, *shape: int, seed: int = 1) -> Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


CASES = {
    "perceptron": (Perceptron, lambda: (draw(7, 6), numbers(4, 7))),
    "convolutions": (Convolutions, lambda: (draw(5, 2, 6, 6), numbers(3, 5))),
    "tied": (Tied, lambda: (numbers(9, 6, 4, seed=2), numbers(9, 6, 4))),
    "twice": (Twice, lambda: (draw(5, 6), numbers(6, 5))),
    "functional": (Functional, lambda: (draw(5, 6), numbers(4, 5))),
    "transformer": (lambda: transformer(torch.float32), lambda: (numbers(20, 6, 5, seed=2), numbers(3, 6))),
    "scaled": (Scaled, lambda: (draw(6, 6), numbers(4, 6))),
}
ONE_PASS = ("perceptron", "transformer")
"""Those whose Fisher takes one backward pass a batch."""


def case(name: str) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    build, batch = CASES[name]
    return seeded(build), batch()


def nll(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The mean over the labels of one example, x [1, *]."""
    logits = model(x)
    return functional.cross_entropy(logits.flatten(0, -2), y.flatten())


def fisher_by_example(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Mean of squared gradients in fp64, a backward pass for each example."""
    model, (x, y) = model.double(), batch
    x = x.double() if x.is_floating_point() else x
    totals = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for i in range(len(x)):
        model.zero_grad()
        nll(model, x[i : i + 1], y[i : i + 1]).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                totals[name] += parameter.grad.square() / len(x)
    model.float()
    return totals


def rows_by_example(model: nn.Module, name: str, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """A linear layer's input rows and, by a perturbation of its output, the gradients of each example's loss there."""
    model, (x, y) = model.double(), batch
    x = x.double() if x.is_floating_point() else x
    inputs, gradients = [], []
    for i in range(len(x)):
        shifts = []

        def shift(module, args, output, shifts=shifts):
            inputs.append(args[0].detach().reshape(-1, args[0].shape[-1]))
            shifts.append(torch.zeros_like(output, requires_grad=True))
            return output + shifts[-1]

        handle = model.get_submodule(name).register_forward_hook(shift)
        loss = nll(model, x[i : i + 1], y[i : i + 1])
        gradients += [g.reshape(-1, g.shape[-1]) for g in torch.autograd.grad(loss, shifts)]
        handle.remove()
    model.float()
    return torch.cat(inputs), torch.cat(gradients)


def mean_gram(rows: Tensor) -> Tensor:
    """Packed."""
    gram = rows.double().T @ rows.double() / len(rows)
    return gram[torch.triu_indices(*gram.shape).unbind()]
