"""Layers of real networks with their statistics: four digits classifiers 1024 wide, one a domain, from one base.

The base sees upright digits; each fine-tune two epochs of its own domain (1000 images of scikit-learn's digits turned,
mirrored, inverted or transposed). Statistics are what `collect_statistics` finds over those images. 1000 rows a task
do not fill 1024 dimensions, so every Gram matrix is singular, as they are for wide layers of large models.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

import peta_fast as pf
from peta_fast.demo.data import TASKS, Images, load_digits
from peta_fast.demo.model import DigitsConfig, DigitsMLP
from peta_fast.demo.train import trained
from peta_fast.ops.gram import unpack

WIDTH = 1024
BLOCK = "layers.1"


@functools.cache
def networks() -> tuple[list[DigitsMLP], list[Images]]:
    """The fine-tuned networks, and what they were tuned on."""
    images = load_digits(0).train
    torch.manual_seed(0)
    start = DigitsMLP(DigitsConfig(hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=2))
    base = trained(start, images, epochs=3, learning_rate=5e-4, seed=0, advance=lambda: None)
    seen = [images.seen_as(task) for task in TASKS]
    return [trained(base, s, epochs=2, learning_rate=1e-4, seed=1, advance=lambda: None) for s in seen], seen


@functools.cache
def statistics() -> list[pf.Statistics]:
    models, seen = networks()
    return [
        pf.collect_statistics(
            model,
            zip(images.pixels.split(250), images.labels.split(250), strict=True),
            kinds=("input_gram", "output_gram"),
            only=lambda name: name.startswith(BLOCK),
        )
        for model, images in zip(models, seen, strict=True)
    ]


def system(layer: str) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Input Grams, output Grams and weights of `layers.1.<layer>`, one a task."""
    name, found = f"{BLOCK}.{layer}", statistics()
    inputs, outputs = ([unpack(s[f"{name}.{kind}"]) for s in found] for kind in ("input_gram", "output_gram"))
    return inputs, outputs, [m.get_submodule(name).weight.detach() for m in networks()[0]]
