"""A small vision transformer for 8x8 images, so that attention is something one can train alone.

h = embed(patches) + position;  h = h + attention(norm1(h));  h = h + fc2(gelu(fc1(norm2(h)))) for each layer
logits = head(mean of norm(h) over the patches)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

PATCH = 2
PATCHES = (8 // PATCH) ** 2
HIDDEN, INNER, HEADS, LAYERS = 64, 128, 4, 3


class Attention(nn.Module):
    """h [N, patches, HIDDEN] -> the same; every patch looks at all."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value, self.dense = (nn.Linear(HIDDEN, HIDDEN) for _ in range(4))

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = (part(h).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.query, self.key, self.value))
        return self.dense(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(HIDDEN), Attention()
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, INNER), nn.Linear(INNER, HIDDEN)

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.attention(self.norm1(h))
        return h + self.fc2(functional.gelu(self.fc1(self.norm2(h))))


class DigitsTransformer(nn.Module):
    """pixels [N, 8, 8] in [0, 1] -> logits [N, 10]."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(PATCH**2, HIDDEN)
        self.position = nn.Parameter(0.1 * torch.randn(PATCHES, HIDDEN))
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = pixels.unflatten(1, (-1, PATCH)).unflatten(-1, (-1, PATCH)).transpose(2, 3)  # [N, 4, 4, 2, 2]
        h = self.embed(2 * patches.flatten(3).flatten(1, 2) - 1) + self.position
        for layer in self.layers:
            h = layer(h)
        return self.head(self.norm(h).mean(1))
