"""Which code runs a pass: native code on the CPU, Triton kernels on CUDA, elsewhere PyTorch in tiles."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from peta_fast.ops.concrete_mask import native, tiles
from peta_fast.ops.concrete_mask.pieces import Adam, Piece

FLOATING = (torch.float32, torch.float16, torch.bfloat16)


def sample(logits: Tensor, key: int, temperature: float, out: Tensor) -> None:
    """out [*S] = m"""
    code_for(Piece(logits=logits, out=out)).sample(logits, key, temperature, out)


def means(pieces: Sequence[Piece], temperature: float) -> list[Tensor]:
    """The mean of every mask, 0-dimensional fp64; 1 where there are no logits. Also kept in the pieces."""
    found = _each(pieces, lambda code, some, _: code.means(some, temperature), lambda p: p.logits is not None)
    for place, piece in enumerate(pieces):
        if found[place] is None:
            found[place] = torch.ones((), dtype=torch.float64, device=piece.tensors[0].device)
        piece.mean = found[place]
    return found


def merge(pieces: Sequence[Piece], temperature: float) -> None:
    """out = base + sum_t lambda_t (tau_t m) / mean"""
    _each(pieces, lambda code, some, _: code.merge(some, temperature))


def coefficient_gradients(pieces: Sequence[Piece], temperature: float, products: bool = False) -> list[Tensor]:
    """<g, tau_t m> / mean, [T] fp64 a piece. products: each g becomes g sum_t lambda_t tau_t, in place."""
    return _each(pieces, lambda code, some, _: code.coefficient_gradients(some, temperature, products))


def logit_gradients(pieces: Sequence[Piece], shifts: Sequence[Tensor], temperature: float) -> list[Tensor]:
    """The gradients of the logits."""
    return _each(pieces, lambda code, some, at: code.logit_gradients(some, [shifts[i] for i in at], temperature))


def adam(
    pieces: Sequence[Piece],
    shifts: Sequence[Tensor],
    temperature: float,
    moments: Sequence[tuple[Tensor, Tensor]],
    rule: Adam,
) -> None:
    """A step of the logits against their gradients, which are not stored."""
    _each(
        pieces,
        lambda code, some, at: code.adam(some, [shifts[i] for i in at], temperature, [moments[i] for i in at], rule),
    )


def shift_of(coefficients: Tensor, gradients: Tensor, mean: Tensor, size: int) -> Tensor:
    """What the mean's own gradient takes off everywhere: <lambda, dL/dlambda> / (n mean), 0-dimensional fp64."""
    total = (coefficients.double() * gradients).sum()
    return torch.where(mean > 0, total / (mean * max(size, 1)), torch.zeros_like(mean))


def code_for(piece: Piece):
    """The module whose passes take this piece."""
    if native.serves(piece):
        return native
    if runs_kernels(piece):
        from peta_fast.ops.concrete_mask import launch

        return launch
    return tiles


def runs_kernels(piece: Piece) -> bool:
    if piece.logits is not None and piece.logits.dtype != torch.float32:
        return False
    fit = all(t.device.type == "cuda" and t.dtype in FLOATING and t.is_contiguous() for t in piece.tensors)
    return fit and len({t.dtype for t in piece.task_vectors}) <= 1 and has_triton()


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _each(pieces: Sequence[Piece], work: Callable, wanted: Callable[[Piece], bool] = lambda piece: True) -> list:
    """work(module, pieces, their places) for all pieces that a module takes at once; results in the pieces' order."""
    groups: dict = {}
    for place, piece in enumerate(pieces):
        if wanted(piece):
            groups.setdefault(code_for(piece), []).append(place)
    found: list = [None] * len(pieces)
    for code, places in groups.items():
        for place, result in zip(places, work(code, [pieces[i] for i in places], places) or (), strict=False):
            found[place] = result
    return found
