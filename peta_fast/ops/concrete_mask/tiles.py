"""The passes in PyTorch, a tile at a time: what runs in fp64, on tensors with strides, and where no kernel does.

No pass keeps more than a few tiles besides its result. Sums are fp64, tile by tile in order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from peta_fast.ops.concrete_mask.noise import uniforms
from peta_fast.ops.concrete_mask.pieces import Adam, Piece
from peta_fast.ops.concrete_mask.reference import mask_reference

TILE = 1 << 16


def sample(logits: Tensor, key: int, temperature: float, out: Tensor) -> None:
    """out [*S] = m"""
    flat = out.view(-1)
    for tile, m in _masks(Piece(logits=logits, key=key), temperature):
        flat[tile] = m.to(out.dtype)


def means(pieces: Sequence[Piece], temperature: float) -> list[Tensor]:
    """The mean of every mask, 0-dimensional fp64."""
    found = []
    for piece in pieces:
        total = torch.zeros((), dtype=torch.float64, device=piece.tensors[0].device)
        for _, m in _masks(piece, temperature):
            total = total + m.double().sum()
        found.append(total / max(piece.size, 1))
    return found


def merge(pieces: Sequence[Piece], temperature: float) -> None:
    """out = base + sum_t lambda_t (tau_t m) / mean"""
    for piece in pieces:
        out, base = piece.out.view(-1), None if piece.base is None else piece.base.reshape(-1)
        flat, inverse = [t.reshape(-1) for t in piece.task_vectors], _inverse(piece.mean)
        for tile, m in _masks(piece, temperature):
            total = torch.zeros_like(m)
            for coefficient, x in zip(piece.coefficients, flat, strict=True):
                total = total + coefficient.to(m.dtype) * (x[tile].to(m.dtype) * m * inverse.to(m.dtype))
            out[tile] = (total if base is None else base[tile].to(m.dtype) + total).to(out.dtype)


def coefficient_gradients(pieces: Sequence[Piece], temperature: float, products: bool = False) -> list[Tensor]:
    """[T] fp64 each. products: g becomes g sum_t lambda_t tau_t, in place."""
    found = []
    for piece in pieces:
        g, flat = piece.g.view(-1), [t.reshape(-1) for t in piece.task_vectors]
        sums = torch.zeros(len(flat), dtype=torch.float64, device=g.device)
        for tile, m in _masks(piece, temperature):
            gm = g[tile].to(m.dtype) * m
            sums = sums + torch.stack([(gm.double() * x[tile].double()).sum() for x in flat])
            if products:
                g[tile] = (g[tile].to(m.dtype) * _direction(piece, flat, tile, m.dtype)).to(g.dtype)
        found.append(sums * _inverse(piece.mean))
    return found


def logit_gradients(pieces: Sequence[Piece], shifts: Sequence[Tensor], temperature: float) -> list[Tensor]:
    """The gradients of the logits, in their dtype."""
    found = []
    for piece, shift in zip(pieces, shifts, strict=True):
        gradient = torch.empty_like(piece.logits, memory_format=torch.contiguous_format)
        for tile, value in _gradients(piece, shift, temperature):
            gradient.view(-1)[tile] = value
        found.append(gradient)
    return found


def adam(
    pieces: Sequence[Piece],
    shifts: Sequence[Tensor],
    temperature: float,
    moments: Sequence[tuple[Tensor, Tensor]],
    rule: Adam,
) -> None:
    """A step of the logits against their gradients, which are not stored."""
    for piece, shift, (exp_avg, exp_avg_sq) in zip(pieces, shifts, moments, strict=True):
        logits, first, second = piece.logits.view(-1), exp_avg.view(-1), exp_avg_sq.view(-1)
        for tile, g in _gradients(piece, shift, temperature):
            first[tile] = first[tile] * rule.beta1 + g * (1 - rule.beta1)
            second[tile] = second[tile] * rule.beta2 + g * g * (1 - rule.beta2)
            logits[tile] -= rule.rate * first[tile] / (second[tile].sqrt() * rule.root + rule.epsilon)


def _masks(piece: Piece, temperature: float) -> Iterator[tuple[slice, Tensor]]:
    """Every tile with its mask, in the dtype that the arithmetic has: the logits'."""
    like = piece.tensors[0] if piece.logits is None else piece.logits
    dtype = torch.promote_types(like.dtype, torch.float32)
    logits = None if piece.logits is None else piece.logits.reshape(-1)
    for begin in range(0, piece.size, TILE):
        tile = slice(begin, min(begin + TILE, piece.size))
        if logits is None:
            yield tile, torch.ones(tile.stop - begin, dtype=dtype, device=like.device)
        else:
            u = uniforms(piece.key, begin, tile.stop, dtype, like.device)
            yield tile, mask_reference(logits[tile].to(dtype), u, temperature)


def _gradients(piece: Piece, shift: Tensor, temperature: float) -> Iterator[tuple[slice, Tensor]]:
    g, flat, inverse = piece.g.reshape(-1), [t.reshape(-1) for t in piece.task_vectors], _inverse(piece.mean)
    for tile, m in _masks(piece, temperature):
        gd = g[tile].to(m.dtype) * _direction(piece, flat, tile, m.dtype)
        yield tile, (gd * inverse.to(m.dtype) - shift.to(m.dtype)) * (m * (1 - m) / temperature)


def _direction(piece: Piece, flat: Sequence[Tensor], tile: slice, dtype: torch.dtype) -> Tensor | float:
    if not flat:
        return 1.0
    return sum(c.to(dtype) * x[tile].to(dtype) for c, x in zip(piece.coefficients, flat, strict=True))


def _inverse(mean: Tensor) -> Tensor:
    """1 / mean, 0 where nothing is kept."""
    return torch.where(mean > 0, 1 / mean, torch.zeros_like(mean))
