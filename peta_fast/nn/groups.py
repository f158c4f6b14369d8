"""Layers of one x (q, k and v; gate and up) computed together when the first of them is called.

A group keeps what it computed ahead until the others are called, and hands it out where they are called with the very
same x - the same tensor object at the same version - and nothing that their value depends on has changed: parameters
(objects, versions, requires_grad), active adapters, training, autocast and grad mode, CUDA stream. Otherwise a layer
computes alone, and is not computed ahead from that leader again. What was computed ahead is let go of with the last
member that takes its own, at the latest when one that was called already is called again.

The group steps aside, each layer computing alone: under torch.compile, torch.func and forward AD; under saved-tensor
hooks, which is what non-reentrant checkpointing is made of (forward and recomputation must save the same tensors); in
inference mode, whose tensors have no version; for tensors of other types (DTensor, FakeTensor); with dropout while
training, whose random numbers would be drawn in another order if a layer turned out to be called with another x; for
quantized weights; for members with forward pre-hooks; and for whole-model linearization.

Why groups are asked for and not found by default: their numbers are the single layers' to rounding, not bit for bit;
their backward is one, so that two losses of two members need retain_graph=True; and, as for autograd itself, a write
through `.data` between two members' calls goes unseen.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from peta_fast.errors import RecipeError
from peta_fast.nn.adapter import stack
from peta_fast.ops.linearized_lora import Projection, linearized_lora_group

AUTO = "auto"
Groups = str | Collection[Collection[str]] | None


class Ahead(NamedTuple):
    """What one call computed for others.

    state    of x and of the modes
    members  place -> (fingerprint, output), of those that have not been called since
    called   places of those that have
    """

    leader: int
    x: Tensor
    state: tuple
    members: dict[int, tuple[tuple, Tensor]]
    called: set[int]


class ProjectionGroup:
    """Members of one parent that take an x of the same size.

    Members are known by their place; a layer makes itself known by being called, so that copies and unpickled groups
    find their own. followers[i]: the places of those that are computed when i is called first. Declared groups begin
    with everybody; otherwise a layer follows the one before it once it was seen to be called with the same x.
    """

    def __init__(self, size: int, declared: bool):
        self.followers = [set(range(size)) - {i} if declared else set() for i in range(size)]
        self.refused: set[tuple[int, int]] = set()
        self._forget()

    def _forget(self) -> None:
        self.known: list[weakref.ref | None] = [None] * len(self.followers)
        self.ahead: Ahead | None = None
        self.led: tuple[int, weakref.ref, tuple] | None = None

    def __getstate__(self) -> dict:
        return {"followers": self.followers, "refused": self.refused}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._forget()

    def join(self, place: int, layer: nn.Module) -> None:
        known = self.known[place]
        if known is None or known() is None:
            self.known[place] = weakref.ref(layer)

    def output(self, place: int, layer: nn.Module, x: Tensor) -> Tensor | None:
        """The layer's y [*, out], or None: then it is to compute alone."""
        self.join(place, layer)
        if self.known[place]() is not layer:
            return None  # a shallow copy of a member, which DataParallel makes
        if is_out_of_sight(x):
            self.ahead = None
            return None
        state, own = state_of(x), fingerprint(layer, x)
        if self.ahead is not None and place in self.ahead.called:
            self._let_go()
        if self.ahead is not None:
            y = self._taken(place, x, state, own)
            if y is not None or self.ahead is not None:
                return y
        if own is None or self._follows(place, x, state):
            return None
        return self._computed(place, layer, x, state)

    def _let_go(self) -> None:
        """Of what nobody took, and will not be computed again."""
        ahead, self.ahead = self.ahead, None
        for place in ahead.members:
            self._refuse(ahead.leader, place)

    def _refuse(self, leader: int, place: int) -> None:
        self.followers[leader].discard(place)
        self.refused.add((leader, place))

    def _taken(self, place: int, x: Tensor, state: tuple, own: tuple | None) -> Tensor | None:
        """What was computed ahead for this layer, where it is what the layer would compute now."""
        ahead = self.ahead
        ahead.called.add(place)
        then, y = ahead.members.pop(place, (None, None))
        if not ahead.members:
            self.ahead = None
        if y is not None and not (ahead.x is x and ahead.state == state and is_same(then, own)):
            self._refuse(ahead.leader, place)
            return None
        return y

    def _follows(self, place: int, x: Tensor, state: tuple) -> bool:
        """Whether the layer has the x of the one that led last, which is learned; otherwise it leads now."""
        led = self.led
        if led is None or led[0] == place or led[1]() is not x or led[2] != state:
            self.led = (place, weakref.ref(x), state)
            return False
        if (led[0], place) not in self.refused:
            self.followers[led[0]].add(place)
        return True

    def _computed(self, place: int, layer: nn.Module, x: Tensor, state: tuple) -> Tensor | None:
        """Own y, with those of the followers kept; None where there are none."""
        others = {}
        for i in sorted(self.followers[place]):
            other = None if self.known[i] is None else self.known[i]()
            print_of = None if other is None else fingerprint(other, x)
            if print_of is not None and not other._forward_pre_hooks:
                others[i] = (other, print_of)
        if not others:
            return None
        members = (layer, *(other for other, _ in others.values()))
        y, *ys = linearized_lora_group(x, [projection(member) for member in members])
        kept = {i: (print_of, y_i) for (i, (_, print_of)), y_i in zip(others.items(), ys, strict=True)}
        self.ahead = Ahead(place, x, state, kept, {place})
        return y


def is_out_of_sight(x: Tensor) -> bool:
    """Whether something is at work that computing ahead would disturb, or that could change x unseen."""
    return (
        type(x) not in (Tensor, nn.Parameter)
        or x.is_inference()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    )


def state_of(x: Tensor) -> tuple:
    """What must not have changed between the call of the first member and those of the others, beside the object x."""
    kind = x.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    stream = torch.cuda.current_stream(x.device).cuda_stream if kind == "cuda" else None
    return (
        x._version, x.requires_grad, x.data_ptr(), torch.is_grad_enabled(), autocast, stream, threading.get_ident()
    )  # fmt: skip


def fingerprint(layer: nn.Module, x: Tensor) -> tuple | None:
    """All that the layer's value depends on beside x; None where it must compute alone, be it to raise its error."""
    if layer._disabled or layer.merged or not layer.active or layer.quantized or layer.scope != "layer":
        return None
    adapters = [layer.adapter(name) for name in layer.active]
    if layer.training and adapters[0].dropout:
        return None
    tensors = [layer.weight, layer.bias]
    for a in adapters:
        tensors += (a.A0, a.B0, a.delta_A, a.delta_B)
    here = x.device
    for t in tensors:
        if t is not None and (type(t) not in (Tensor, nn.Parameter) or t.device != here or t.is_inference()):
            return None
    weight = layer._matrix()
    if weight.shape != (layer.out_features, layer.in_features) or x.dim() == 0 or x.shape[-1] != layer.in_features:
        return None
    if weight.dtype != x.dtype and not torch.is_autocast_enabled(here.type):
        return None
    marks = tuple(None if t is None else (t._version, t.requires_grad, t.data_ptr()) for t in tensors)
    return layer.training, layer.active, tuple(a.scaling for a in adapters), marks, tensors


def is_same(then: tuple, now: tuple | None) -> bool:
    """Tensors by identity, since equal is not the same."""
    return now is not None and then[:-1] == now[:-1] and all(a is b for a, b in zip(then[-1], now[-1], strict=True))


def projection(layer: nn.Module) -> Projection:
    """Without dropout, since a layer with one that is in force has no fingerprint."""
    f = stack([layer.adapter(name).factors() for name in layer.active])
    return Projection(layer._matrix(), layer.bias, f.A0, f.delta_A, f.B0, f.delta_B, f.scaling)


# ---------------------------------------------------------------- which layers of a model


def group_projections(model: nn.Module, groups: Groups) -> None:
    """Puts linearized layers of one parent into groups, or with None takes them out of theirs.

    groups  "auto": siblings with the same in_features, who then learn in their first call who shares an x;
            or lists of names, as [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]], each of siblings
    Raises RecipeError for names of which no parent has two that are linearized, and for siblings of other sizes.
    """
    from peta_fast.nn.model import some_layers

    if hasattr(model, "peft_config"):
        if groups is None:
            return
        raise RecipeError(
            "groups", "got a PeftModel, whose layers are PEFT's", "Linearize its base model: model.get_base_model()."
        )
    check_groups(groups)
    found = some_layers(model)
    for layer in found.values():
        layer.group = None
    if groups is None:
        return
    families: dict[str, dict[str, nn.Module]] = {}
    for name, layer in found.items():
        parent, _, child = name.rpartition(".")
        families.setdefault(parent, {})[child] = layer
    if groups == AUTO:
        for family in families.values():
            for size in {layer.in_features for layer in family.values()}:
                make_group([layer for layer in family.values() if layer.in_features == size], declared=False)
        return
    for names in groups:
        chosen = [[f[n] for n in names if n in f] for f in families.values() if sum(n in f for n in names) > 1]
        if not chosen:
            known = ", ".join(sorted({child for family in families.values() for child in family}))
            raise RecipeError("groups", f"no module has two of {list(names)}", f"Linearized are {known}.")
        for members in chosen:
            sizes = {layer.name: layer.in_features for layer in members}
            if len(set(sizes.values())) > 1:
                raise RecipeError("groups", f"the members differ in in_features: {sizes}", "They share no x.")
            make_group(members, declared=True)


def check_groups(groups: Groups) -> None:
    """Raises RecipeError for what is neither None, "auto" nor lists of distinct names."""
    if groups is None or groups == AUTO:
        return
    is_lists = not isinstance(groups, str) and all(not isinstance(g, str) and len(g) > 1 for g in groups)
    if not is_lists:
        raise RecipeError("groups", f"is {groups!r}, expected None, 'auto' or lists of two or more names")
    names = [name for group in groups for name in group]
    if len(set(names)) != len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise RecipeError("groups", f"names {twice!r} twice", "A layer is in one group at most.")


def make_group(members: Sequence[nn.Module], declared: bool) -> None:
    if len(members) > 1:
        group = ProjectionGroup(len(members), declared)
        for place, layer in enumerate(members):
            layer.group = (group, place)
            group.join(place, layer)
