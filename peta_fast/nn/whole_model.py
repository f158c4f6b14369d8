"""A whole model, linearized in its adapters: the paper's equation, not a stack of linearized layers.

    f_lin(x; phi) = f(x; phi0) + J(x; phi0) (phi - phi0)

Every adapted layer computes its value at phi0 and its tangent with the dual operation, in one pass over its weight; the
tangents flow through the rest of the network by forward AD. The result is exactly linear in phi, through the whole
depth, which a stack of linearized layers is not: there the input of a layer depends on the steps of those below it.
Source: Tang et al., ICLR 2024, arXiv:2310.04742, equation 2.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree

from peta_fast.errors import CompatibilityError, RecipeError
from peta_fast.formats.peft_adapter import LinearizedFactors
from peta_fast.ops.linearized_lora import linearized_lora_dual

LABELS = ("labels", "label", "label_ids", "start_positions", "end_positions", "next_sentence_label")
"""Arguments by which transformers' models compute a loss inside their forward."""


class LinearizedModel(nn.Module):
    """Calls `model` once, with tangents, and returns value + tangent of every floating tensor that it returns.

    Linearized is what the model returns: logits or hidden states. A loss computed inside the forward would be
    linearized as well, which is another function, so labels are refused: compute the loss from the logits
    (with HF Trainer: `compute_loss_func=lambda outputs, labels, **_: cross_entropy(outputs.logits, labels)`).
    Attention runs on the math backend, the one with forward AD. Gradients flow to the adapters by reverse mode.
    Unknown attributes are the model's.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, *args, **kwargs):
        refuse_unlinearized(kwargs)
        with forward_ad_only(), forward_ad.dual_level(), named_errors():
            return _pytree.tree_map(value_plus_tangent, self.model(*args, **kwargs))

    def dual(self, *args, **kwargs):
        """(f(x; phi0), J (phi - phi0)), each shaped as the model's output."""
        refuse_unlinearized(kwargs)
        with forward_ad_only(), forward_ad.dual_level(), named_errors():
            output = self.model(*args, **kwargs)
            return _pytree.tree_map(value_of, output), _pytree.tree_map(tangent_of, output)

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(super().__getattr__("model"), name)


def refuse_unlinearized(kwargs: dict) -> None:
    """Refuses a loss inside the forward, and a cache of keys and values, which would keep values without tangents."""
    if kwargs.get("past_key_values") is not None or kwargs.get("use_cache"):
        raise RecipeError(
            "LinearizedModel", "got a cache of keys and values, which holds no tangents", "Pass use_cache=False."
        )
    given = [name for name in LABELS if kwargs.get(name) is not None]
    if given:
        raise RecipeError(
            "LinearizedModel",
            f"got {', '.join(given)}: the forward's own loss would be linearized, not computed from linearized logits",
            "Leave them out and compute the loss from the output's logits.",
        )


@contextlib.contextmanager
def forward_ad_only() -> Iterator[None]:
    """Only implementations that have forward AD: math attention, and no fused nn.MultiheadAttention."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


@contextlib.contextmanager
def named_errors() -> Iterator[None]:
    """An operation without forward AD becomes an error that names it."""
    try:
        yield
    except NotImplementedError as error:
        found = re.search(r"forward AD with (\S+) that does not support it", str(error))
        if found is None:
            raise
        raise CompatibilityError(
            "LinearizedModel",
            f"{found.group(1)} has no forward-mode derivative, so tangents cannot pass it",
            "Choose an implementation that has one (attn_implementation='eager' or 'sdpa' for attention), or "
            "linearize layer by layer with scope='layer'.",
        ) from error


def value_plus_tangent(leaf):
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
        return leaf
    value, tangent = forward_ad.unpack_dual(leaf)
    return value if tangent is None else value + tangent


def value_of(leaf):
    return forward_ad.unpack_dual(leaf).primal if isinstance(leaf, Tensor) else leaf


def tangent_of(leaf):
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
        return leaf
    value, tangent = forward_ad.unpack_dual(leaf)
    return torch.zeros_like(value) if tangent is None else tangent


def dual_call(layer, x: Tensor, weight: Tensor, factors: LinearizedFactors, dropout: float) -> Tensor:
    """The layer inside LinearizedModel.forward: x, with or without a tangent, to a dual tensor.

    Raises CompatibilityError outside of it: with no tangent to carry, the adapter would be silently without effect.
    """
    if forward_ad._current_level < 0:
        raise CompatibilityError(
            layer.name,
            "belongs to a whole-model linearization and was called outside of its forward",
            "Call the model that linearize returned, and leave out gradient checkpointing, which repeats parts of it.",
        )
    x, dx = forward_ad.unpack_dual(x)
    f = factors
    if not (layer.training and dropout):
        y0, dy = linearized_lora_dual(x, dx, weight, layer.bias, f.A0, f.delta_A, f.B0, f.delta_B, f.scaling)
        if not any(t is not None and t.requires_grad for t in (x, weight, layer.bias)):
            y0 = y0.detach()  # phi0 is fixed: nothing flows back through the value, and the backward need not look
        return forward_ad.make_dual(y0, dy)
    y0, dy = dropped_branch(x, dx, f, dropout)
    dy = dy if dx is None else functional.linear(dx, weight) + dy
    return forward_ad.make_dual(functional.linear(x, weight, layer.bias) + y0, dy)


def dropped_branch(x: Tensor, dx: Tensor | None, f: LinearizedFactors, dropout: float) -> tuple[Tensor, Tensor]:
    """The adapter's own dual at (D(x), D(dx)), D one mask for both: it is linear in x.

    y0 = s (D(x) A0ᵀ) B0ᵀ;   dy = s [(D(dx) A0ᵀ + D(x) dAᵀ) B0ᵀ + (D(x) A0ᵀ) dBᵀ]
    """
    A0, delta_B = f.A0.to(x.dtype), f.delta_B.to(x.dtype)
    mask = functional.dropout(torch.ones_like(x), dropout)
    x = mask * x
    u = functional.linear(x, A0)
    dy = f.scaling * functional.linear(u, delta_B)
    if f.B0 is None or f.delta_A is None:
        return torch.zeros_like(dy), dy
    B0 = f.B0.to(x.dtype)
    moved = functional.linear(x, f.delta_A.to(x.dtype))
    moved = moved if dx is None else moved + functional.linear(mask * dx, A0)
    return f.scaling * functional.linear(u, B0), dy + f.scaling * functional.linear(moved, B0)
