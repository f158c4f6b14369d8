"""One layer of linearized LoRA in all the ways that are compared, and what its passes cost in time and memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peta_fast.formats.peft_adapter import LinearizedFactors
from peta_fast.nn import LinearizedLoRALinear
from peta_fast.ops.linearized_lora.reference import JvpReference, PlainLoRA

SCALING = 2.0
GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
MOST_ERROR = 2.0**-6 if GPU else 1e-4
"""A speed is no figure where the result is wrong."""


@dataclass(frozen=True)
class Shape:
    """x [M, K], weight [N, K], rank r; general: B0 is not 0."""

    M: int
    K: int
    N: int
    r: int
    general: bool = False

    def __str__(self) -> str:
        return f"M{self.M}-K{self.K}-N{self.N}-r{self.r}-{'general' if self.general else 'b0_is_zero'}"


class Layers:
    """The same layer as ours, as a jvp, as PEFT's LoRA, and without an adapter; each a function x -> y."""

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype):
        generator = torch.Generator().manual_seed(0)

        def normal(*size: int, scale: float) -> Tensor:
            return (scale * torch.randn(*size, generator=generator)).to(device, dtype)

        M, K, N, r = shape.M, shape.K, shape.N, shape.r
        self.shape, self.x = shape, normal(M, K, scale=1.0).requires_grad_()
        self.weight, self.bias = normal(N, K, scale=K**-0.5), normal(N, scale=0.1)
        self.A0, self.dB = normal(r, K, scale=K**-0.5), normal(N, r, scale=0.02).requires_grad_()
        self.dA = normal(r, K, scale=0.1 * K**-0.5).requires_grad_() if shape.general else None
        self.B0 = normal(N, r, scale=0.1) if shape.general else None
        self.g = normal(M, N, scale=1.0)

    def ours(self) -> LinearizedLoRALinear:
        """The module that a user trains, its checks included, around this very weight."""
        r = self.shape.r
        dA, dB = None if self.dA is None else self.dA.detach(), self.dB.detach()
        factors = LinearizedFactors(self.A0, self.B0, dA, dB, SCALING, alpha=SCALING * r)
        return LinearizedLoRALinear.from_factors(self.linear(), factors)

    def linear(self) -> nn.Linear:
        """Without an adapter; shares the weight and the bias."""
        linear = nn.Linear(self.shape.K, self.shape.N, device="meta")
        linear.weight, linear.bias = (nn.Parameter(t, requires_grad=False) for t in (self.weight, self.bias))
        return linear

    def jvp(self, dtype: torch.dtype | None = None) -> JvpReference:
        B0 = torch.zeros_like(self.dB) if self.B0 is None else self.B0
        tensors = (t.detach().to(dtype or t.dtype) for t in (self.weight, self.bias, self.A0, B0))
        reference = JvpReference(PlainLoRA(*tensors, SCALING))
        with torch.no_grad():
            reference.layer.lora_B += self.dB
            if self.dA is not None:
                reference.layer.lora_A += self.dA
        return reference

    def bare(self) -> Callable[[Tensor], Tensor]:
        return lambda x: nn.functional.linear(x, self.weight, self.bias)

    def peft(self) -> nn.Module | None:
        """PEFT's LoRA with the adapter in the base's dtype; None without PEFT. PEFT leaves the values of B at 0."""
        try:
            from peft import LoraConfig
            from peft.tuners.lora import Linear
        except ImportError:
            return None
        config = LoraConfig(r=self.shape.r, lora_alpha=2 * self.shape.r)
        return peft_linear(Linear, self.linear(), config).to(self.x.device, self.x.dtype)

    def forward(self, layer: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with torch.no_grad():
                return layer(self.x)

        return run

    def forward_backward(self, layer: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
        """The gradient of x, since a layer in the middle of a model passes one on, and of what it trains."""

        def run() -> Tensor:
            self.x.grad = None
            y = layer(self.x)
            y.backward(self.g)
            return y

        return run

    def error(self) -> float:
        """Largest |y - exact| / |exact|max, and the same of the gradients, against the jvp in fp64."""
        exact = self.jvp(torch.float64)
        x = self.x.detach().double().requires_grad_()
        y_exact = exact(x)
        steps = [exact.layer.lora_A, exact.layer.lora_B] if self.dA is not None else [exact.layer.lora_B]
        truths = [y_exact, *torch.autograd.grad(y_exact, [x, *steps], self.g.double())]
        ours = self.ours()
        y = ours(self.x)
        leaves = [self.x, *ours.steps()]
        founds = [y, *torch.autograd.grad(y, leaves, self.g)]
        return max(((f.double() - t).abs().max() / t.abs().max()).item() for f, t in zip(founds, truths, strict=True))


def peft_linear(kind, base: nn.Linear, config) -> nn.Module:
    """PEFT 0.21 takes the config, older ones the numbers in it."""
    try:
        return kind(base, "default", config, r=config.r, lora_alpha=config.lora_alpha)
    except TypeError:
        return kind(base, "default", r=config.r, lora_alpha=config.lora_alpha)


def finished(work: Callable[[], object], device: str) -> Callable[[], None]:
    """The work and the wait for its end, so that a clock can time it."""

    def run() -> None:
        work()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure_beside(measure, passes, ours, theirs, bare, shape: object, error: float, **described) -> None:
    """A row of `ours` beside `theirs`, with `bare` as the floor; each a function that `passes` makes a call of."""
    assert error < MOST_ERROR, f"the result is off by {error}"
    ours, theirs, bare = (finished(passes(function), DEVICE) for function in (ours, theirs, bare))
    for work in (ours, theirs, bare):
        work()
    measure(
        ours,
        floor=lambda: seconds(bare),
        reference=lambda: seconds(theirs),
        error=lambda: error,
        error_unit="relative",
        shape=f"{shape}, {str(DTYPE).removeprefix('torch.')}, {DEVICE}",
        **described,
    )


def seconds_on_gpu(work: Callable[[], object], calls: int = 10) -> float:
    """By events, over enough calls to hide the launches."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def owned_by(layers: Layers, layer: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """A layer's tensors: base weight, bias, adapter, and the jvp's second copy of them."""
    if isinstance(layer, nn.Module):
        return [*layer.parameters(), *layer.buffers()]
    return [layers.weight, layers.bias]


def owned_bytes(layers: Layers, layer: Callable[[Tensor], Tensor]) -> int:
    return sum(t.nbytes for t in owned_by(layers, layer))


def kept_bytes(layers: Layers, layer: Callable[[Tensor], Tensor]) -> int | None:
    """Bytes that the forward keeps for the backward, each storage once, without x and what the layer owns.

    None for the jvp, inside which PyTorch lets nobody look at what is saved.
    """
    if isinstance(layer, JvpReference):
        return None
    held = {t.untyped_storage().data_ptr() for t in (layers.x, *owned_by(layers, layer))}
    kept = {}

    def note(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in held:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        layer(layers.x)
    return sum(kept.values())


def peak_weight_bytes(layers: Layers, layer: Callable[[Tensor], Tensor], backward: bool = True) -> int:
    """Bytes of the weight-sized tensors alive at the worst moment of a call: what the layer owns, and what it makes.

    A storage counts once, with as many bytes as it has, whatever views it has. Weight-sized is what is [out, in] or
    [in, out]; activations of the same shape would count too, so M may be neither in nor out.
    """
    assert layers.shape.M not in (layers.shape.N, layers.shape.K)
    alive = WeightsAlive((layers.shape.N, layers.shape.K))
    alive.note(owned_by(layers, layer))
    work = layers.forward_backward(layer) if backward else layers.forward(layer)
    with alive:
        work()
    return alive.peak


class WeightsAlive(TorchDispatchMode):
    """Looks after every operation which storages of tensors of this shape, either way round, are still there."""

    def __init__(self, shape: tuple[int, int]):
        super().__init__()
        self.shapes = {shape, shape[::-1]}
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        results = function(*arguments, **(options or {}))
        self.note(tree_leaves(results))
        return results

    def note(self, tensors) -> None:
        self.storages = {k: found for k, found in self.storages.items() if not found[0].expired()}
        for tensor in tensors:
            if isinstance(tensor, Tensor) and tuple(tensor.shape) in self.shapes:
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self.storages.values()))
