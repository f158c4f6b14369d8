"""Models with statistics for tests of the methods that solve linear systems, and the dense solutions in numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from model_folders import save_model
from safetensors.torch import save_file
from torch import Tensor

State = dict[str, Tensor]

W1, W2 = torch.eye(2), torch.tensor([[3.0, 2], [1, -1]])
PAIR = [{"a.weight": W1, "a.bias": torch.ones(2)}, {"a.weight": W2, "a.bias": torch.zeros(2)}]
GRAMS = [torch.tensor([2 / 3, 1 / 3, 5 / 3]), torch.tensor([5 / 3, 1 / 3, 1])]
OUTPUTS = [torch.tensor([0.52, 0.15, 0.625]), torch.tensor([0.625, 0.125, 0.125])]
PAIR_STATISTICS = [{"a.input_gram": g, "a.output_gram": o} for g, o in zip(GRAMS, OUTPUTS, strict=True)]
"""The example of the specification, worked by hand: [out, in] weights and packed Grams."""

FISHERS = [{"v.fisher": torch.tensor([4, 0, 1e-12])}, {"v.fisher": torch.tensor([1, 0, 3e-12])}]
VECTORS = [{"v": torch.ones(3)}, {"v": torch.full((3,), 3.0)}]

SHAPES = {"embed.weight": (11, 6), "layers.0.fc.weight": (5, 6), "layers.0.fc.bias": (5,), "lm_head.weight": (11, 5)}
LAYERS = ("layers.0.fc", "lm_head")


class Described(dict):
    """A dict with metadata, as collected statistics are."""

    def __init__(self, tensors: State, **metadata: str):
        super().__init__(tensors)
        self.metadata = metadata


def packed_gram(side: int, seed: int) -> Tensor:
    x = torch.randn(4 * side, side, generator=torch.Generator().manual_seed(seed))
    return (x.T @ x / len(x))[torch.triu_indices(side, side).unbind()].contiguous()


def full(packed: Tensor) -> np.ndarray:
    """[n, n] fp64 of a packed upper triangle."""
    side = int((8 * len(packed) + 1) ** 0.5 - 1) // 2
    upper = np.zeros((side, side))
    upper[np.triu_indices(side)] = packed.double().numpy()
    return upper + np.triu(upper, 1).T


def models(tasks: int = 3, shapes=SHAPES) -> list[State]:
    return [
        {
            n: torch.randn(s, generator=torch.Generator().manual_seed(100 * t + i))
            for i, (n, s) in enumerate(shapes.items())
        }
        for t in range(tasks)
    ]


def statistics(tasks: int = 3, shapes=SHAPES, layers=LAYERS) -> list[State]:
    """Input and output Grams of the layers, and the Fisher of every tensor."""
    found = []
    for t in range(tasks):
        state: State = {}
        for i, layer in enumerate(layers):
            out, width = shapes[f"{layer}.weight"]
            state[f"{layer}.input_gram"] = packed_gram(width, 50 * t + i)
            state[f"{layer}.output_gram"] = packed_gram(out, 50 * t + 20 + i)
        for i, (name, shape) in enumerate(shapes.items()):
            draw = torch.Generator().manual_seed(1000 * t + i)
            state[f"{name}.fisher"] = torch.rand(shape, generator=draw)
        found.append(state)
    return found


def scaled(gram: np.ndarray, factor: float) -> np.ndarray:
    return factor * gram + (1 - factor) * np.diag(np.diag(gram))


def dense(weights: list[Tensor], grams: list[Tensor], outputs: list[Tensor] | None = None, factor: float = 1.0):
    """W with sum O W G = sum O W_t G, by one system for all elements, fp64."""
    inputs = [scaled(full(g), factor) for g in grams]
    sides = [scaled(full(o), factor) for o in outputs] if outputs else [np.eye(len(w)) for w in weights]
    matrix = sum(np.kron(o, g) for o, g in zip(sides, inputs, strict=True))
    right = sum(o @ w.double().numpy() @ g for o, w, g in zip(sides, weights, inputs, strict=True))
    return torch.from_numpy(np.linalg.solve(matrix, right.reshape(-1)).reshape(right.shape))


def save_all(folder: Path, states: list[State], collected: list[State], base: State | None = None) -> dict:
    """Models and statistics in files; the recipe's `models` and `base_model` for them."""
    listed = []
    for name, state, found in zip("abcdefgh", states, collected, strict=False):
        save_model(folder / name, state)
        metadata = getattr(found, "metadata", {})
        save_file(dict(found), folder / f"{name}.stats.safetensors", metadata={"format": "pt", **metadata})
        own = {"statistics": str(folder / f"{name}.stats.safetensors")}
        listed.append({"model": str(folder / name), "parameters": own})
    if base is None:
        return {"models": listed}
    save_model(folder / "base", base)
    return {"models": listed, "base_model": str(folder / "base")}
