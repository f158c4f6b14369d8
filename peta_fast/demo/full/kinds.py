"""The five ways to fine-tune, and the space in which the fine-tunes of each are merged.

    full          all weights of the base                              merged as weights
    attention     the weights of attention projections alone           merged as weights
    lora          LoRA                                                  its dense changes s B A, added to the weights
    linear_layer  LoRA, every layer linearized                          its steps (phi - phi0)
    linear_model  LoRA, the whole network linearized at once            its steps, evaluated in the tangent model

Adapters start from one point for all tasks, with B0 = 0, so that linearized LoRA trains B alone.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peta_fast.demo.adapters import LoRALinear
from peta_fast.demo.full.tracks import Track
from peta_fast.fit.statistics import Statistics, collect_statistics
from peta_fast.nn import attention_only, linearize
from peta_fast.nn.model import layers, replace_module
from peta_fast.ops.gram import pack, unpack

KINDS = {
    "full": "full fine-tuning",
    "attention": "attention only",
    "lora": "LoRA",
    "linear_layer": "L-LoRA, layer-wise",
    "linear_model": "L-LoRA, whole model",
}
"""Name -> how tables and pictures call it."""
POINT = 42
"""Seed of the adapters' common starting point, to which the run's seed is added."""

State = dict[str, Tensor]


def trainable(kind: str, track: Track, seed: int) -> nn.Module:
    """A copy of the base, in which what this kind trains requires a gradient."""
    model = copy.deepcopy(track.base)
    if kind == "full":
        return model.requires_grad_(True)
    if kind == "attention":
        return attention_only(model)
    settings = track.settings
    scope = "model" if kind == "linear_model" else "layer"
    model = linearize(model, settings.targets, r=settings.rank, alpha=settings.alpha, seed=POINT + seed, scope=scope)
    if kind == "lora":
        for name, layer in list(layers(model)):
            replace_module(model, name, LoRALinear(layer))
    return model


def trained_state(kind: str, model: nn.Module) -> State:
    """What a fine-tune brings to a merge: trained tensors; for LoRA the changed weights of its modules."""
    if kind == "lora":
        return {f"{name}.weight": dense(m) for name, m in model.named_modules() if isinstance(m, LoRALinear)}
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def dense(layer: LoRALinear) -> Tensor:
    """W + s B A"""
    return layer.weight + layer.scaling * (layer.B0 + layer.delta_B) @ (layer.A0 + layer.delta_A)


@dataclass(frozen=True)
class Space:
    """Where fine-tunes of one kind are merged.

    model    runs what a merge gives, once put(state) was called
    origin   the base in this space: weights, or steps of zero
    """

    kind: str
    track: Track
    model: nn.Module
    origin: State

    @torch.no_grad()
    def put(self, state: Mapping[str, Tensor]) -> nn.Module:
        parameters = dict(self.model.named_parameters())
        for name, tensor in state.items():
            parameters[name].copy_(tensor)
        return self.model

    def whole(self, state: Mapping[str, Tensor]) -> State:
        """All of the model's parameters: what a fit takes."""
        return {**{n: p.detach() for n, p in self.model.named_parameters()}, **state}

    def current(self) -> State:
        parameters = dict(self.model.named_parameters())
        return {name: parameters[name].detach().clone() for name in self.origin}

    @property
    def linearized(self) -> bool:
        return self.kind in ("linear_layer", "linear_model")


def space_of(kind: str, track: Track, seed: int) -> Space:
    if kind in ("linear_layer", "linear_model"):
        model = trainable(kind, track, seed)
        return Space(kind, track, model, trained_state(kind, model))
    names = trained_state(kind, trainable(kind, track, seed))
    model = copy.deepcopy(track.base)
    parameters = dict(model.named_parameters())
    return Space(kind, track, model, {name: parameters[name].detach().clone() for name in names})


def solved_name(name: str) -> str:
    """Under which solved merges know a tensor: a layer's step is the weight of a layer of its own, with r inputs."""
    return name.removesuffix(".delta_B") + ".weight" if name.endswith(".delta_B") else name


def statistics_of(space: Space, state: Mapping[str, Tensor], task: str) -> Statistics:
    """Fisher and, where layers have inputs of their own, Gram matrices of one fine-tune on its training examples."""
    track, wanted = space.track, set(space.origin)
    batches = track.batches(task, "train", track.settings.batch, most=track.settings.statistics)
    given = {"logits": track.logits(task)}
    space.put({**space.origin, **state})
    if not space.linearized:
        kinds = ("fisher", "input_gram", "output_gram")
        return collect_statistics(
            space.model, batches, kinds=kinds, only=lambda n: n in wanted or f"{n}.weight" in wanted, **given
        )
    fisher = collect_statistics(space.model, batches, kinds=("fisher",), only=lambda n: n in wanted, **given)
    found = {solved_name(name.removesuffix(".fisher")) + ".fisher": tensor for name, tensor in fisher.items()}
    if space.kind == "linear_model":
        return Statistics(found, fisher.metadata)
    plain = with_changes(space)
    modules = {name for name, _ in layers(space.model)}
    grams = collect_statistics(
        plain, batches, kinds=("input_gram", "output_gram"), only=lambda n: n in modules, **given
    )
    points = {name: layer.A0 for name, layer in layers(space.model)}
    for name, gram in grams.items():
        module, _, side = name.rpartition(".")
        found[name] = pack(seen_through(points[module], unpack(gram))) if side == "input_gram" else gram
    return Statistics(found, grams.metadata)


def seen_through(A0: Tensor, gram: Tensor) -> Tensor:
    """Gram of A0 x from that of x: the inputs of B."""
    return A0 @ gram @ A0.T


def with_changes(space: Space) -> nn.Module:
    """The plain network that a layer-wise linearized one equals: weights W + s dB A0."""
    model = copy.deepcopy(space.track.base)
    with torch.no_grad():
        for name, layer in layers(space.model):
            model.get_submodule(name).weight += layer.scaling * layer.delta_B @ layer.A0
    return model
