"""Real data without a network: scikit-learn's 1797 handwritten digits, 8x8 pixels, seen in five domains.

The digits as they were written are the domain "upright". Four more domains are the same digits turned, mirrored,
inverted or transposed; recognizing the digit in one of them is one task. Ten classes in every domain.
Source of the images: Alpaydin and Kaynak, UCI Machine Learning Repository, 1998, doi:10.24432/C50P49.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from peta_fast.demo.extras import import_extra

UPRIGHT = "upright"
"""The domain that the base is trained on."""

TASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "rotated": lambda images: images.rot90(1, (-2, -1)),
    "mirrored": lambda images: images.flip(-1),
    "inverted": lambda images: 1 - images,
    "transposed": lambda images: images.transpose(-2, -1),
}
"""Domain of each task -> how upright images [N, 8, 8] in [0, 1] look in it."""

TRAIN, VALIDATION = 1000, 300
"""Images in these two splits; the other 497 are the test split."""


@dataclass(frozen=True)
class Images:
    """pixels [N, 8, 8] fp32 in [0, 1]; labels [N] int64 in 0..9."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def pick(self, index: Tensor) -> Images:
        return Images(self.pixels[index], self.labels[index])

    def seen_as(self, domain: str) -> Images:
        """The same digits in a domain: "upright" or a key of TASKS."""
        return self if domain == UPRIGHT else Images(TASKS[domain](self.pixels).contiguous(), self.labels)

    def few_per_digit(self, count: int) -> Images:
        """The first `count` images of each digit."""
        digits = [torch.nonzero(self.labels == digit).flatten()[:count] for digit in range(10)]
        return self.pick(torch.cat(digits))


@dataclass(frozen=True)
class Digits:
    """Three splits that share no image: weights see train, scalings see validation, reported numbers come from test."""

    train: Images
    validation: Images
    test: Images


def load_digits(seed: int) -> Digits:
    """The splits, drawn by seed. Raises PetaFastError when scikit-learn is not installed."""
    raw = import_extra("sklearn.datasets").load_digits()
    everything = Images(torch.tensor(raw.images / 16, dtype=torch.float32), torch.tensor(raw.target, dtype=torch.int64))
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(everything)))
    train, validation, test = order.tensor_split((TRAIN, TRAIN + VALIDATION))
    return Digits(everything.pick(train), everything.pick(validation), everything.pick(test))


def mix(parts: Iterable[Images]) -> Images:
    """All images of the parts, in that order."""
    parts = list(parts)
    return Images(torch.cat([part.pixels for part in parts]), torch.cat([part.labels for part in parts]))
