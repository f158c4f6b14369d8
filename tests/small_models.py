"""Small networks with the names of real ones, and steps that are far from zero, for tests of linearized layers."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import peta_fast as pf


class Attention(nn.Module):
    """One attention head with a residual, x [*, L, n] -> [*, L, n]."""

    def __init__(self, width: int):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.out_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return x + self.out_proj(nn.functional.scaled_dot_product_attention(q, k, v))


class Transformer(nn.Module):
    """tokens [N, L] -> logits [N, classes], two layers."""

    def __init__(self, width: int = 12, classes: int = 3):
        super().__init__()
        self.embed = nn.Embedding(20, width)
        self.layers = nn.ModuleList(Attention(width) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.classifier(torch.tanh(self.norm(hidden)).mean(-2))


def transformer(dtype: torch.dtype = torch.float64) -> Transformer:
    """The same weights at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Transformer().to(dtype).eval()


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(0, 20, (4, 5), generator=torch.Generator().manual_seed(seed))


def linearized(init: str = "gaussian", dtype: torch.dtype = torch.float64, **options) -> nn.Module:
    """The transformer with steps of ordinary size in q_proj and v_proj."""
    settings = {"r": 3, "alpha": 6, "init": init} | options
    return stepped(pf.linearize(transformer(dtype), ["q_proj", "v_proj"], **settings))


def stepped(model: nn.Module, seed: int = 1, size: float = 1.0) -> nn.Module:
    """Every trained parameter drawn anew."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def base() -> nn.Module:
    return copy.deepcopy(transformer())
