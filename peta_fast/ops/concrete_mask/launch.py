"""Launches the kernels: one launch a pass and tensor, and sums of parts in fp64; nothing waits for the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from peta_fast.ops.concrete_mask import kernels
from peta_fast.ops.concrete_mask.pieces import Adam, Piece

BLOCK, WARPS = 1024, 8
DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def launch(kernel, blocks: int, *arguments, **options) -> None:
    """Every launch of these kernels goes through here, where tests count them."""
    if blocks:
        with torch.cuda.device_of(next(a for a in arguments if isinstance(a, Tensor))):
            kernel[(blocks,)](*arguments, **options, BLOCK=BLOCK, num_warps=WARPS)


def sample(logits: Tensor, key: int, temperature: float, out: Tensor) -> None:
    """out [*S] fp32 = m"""
    piece = Piece(logits=logits, key=key, out=out)
    launch(kernels.mean_kernel, blocks_of(piece), logits, None, out, piece.size, *noise(piece, temperature),
           SAMPLE=True, SQUARE=temperature == 0.5)  # fmt: skip


def means(pieces: Sequence[Piece], temperature: float) -> list[Tensor]:
    """The mean of every mask, 0-dimensional fp64 on the device."""
    found = []
    for piece in pieces:
        parts = torch.empty(blocks_of(piece), dtype=torch.float64, device=piece.logits.device)
        launch(kernels.mean_kernel, len(parts), piece.logits, parts, None, piece.size, *noise(piece, temperature),
               SAMPLE=False, SQUARE=temperature == 0.5)  # fmt: skip
        found.append(parts.sum() / max(piece.size, 1))
    return found


def merge(pieces: Sequence[Piece], temperature: float) -> None:
    """out = base + sum_t lambda_t (tau_t m) / mean"""
    for piece in pieces:
        launch(kernels.merge_kernel, blocks_of(piece), piece.base, *vectors(piece), piece.logits, piece.mean, piece.out,
               piece.size, len(piece.task_vectors), *noise(piece, temperature), BASE=piece.base is not None,
               MASKED=piece.logits is not None, SQUARE=temperature == 0.5, VECTOR=dtype_of(piece))  # fmt: skip


def coefficient_gradients(pieces: Sequence[Piece], temperature: float, products: bool = False) -> list[Tensor]:
    """[T] fp64 each. products: g becomes g sum_t lambda_t tau_t, in place."""
    found = []
    for piece in pieces:
        count = len(piece.task_vectors)
        parts = torch.empty(blocks_of(piece), count, dtype=torch.float64, device=piece.g.device)
        launch(kernels.reduce_kernel, len(parts), piece.g, *vectors(piece), piece.logits, parts,
               piece.g if products else None, piece.size, count, *noise(piece, temperature),
               MASKED=piece.logits is not None, PRODUCT=products, SQUARE=temperature == 0.5,
               VECTOR=dtype_of(piece))  # fmt: skip
        sums = parts.sum(0)
        found.append(torch.where(piece.mean > 0, sums / piece.mean, torch.zeros_like(sums)))
    return found


def logit_gradients(pieces: Sequence[Piece], shifts: Sequence[Tensor], temperature: float) -> list[Tensor]:
    """The gradients of the logits, fp32."""
    found = [torch.empty_like(piece.logits) for piece in pieces]
    for piece, shift, gradient in zip(pieces, shifts, found, strict=True):
        _update(piece, shift, temperature, (gradient, None, None), Adam(0.0, 1), False)
    return found


def adam(
    pieces: Sequence[Piece],
    shifts: Sequence[Tensor],
    temperature: float,
    moments: Sequence[tuple[Tensor, Tensor]],
    rule: Adam,
) -> None:
    """A step of the logits against their gradients, which are not stored. moments: two fp32 tensors a piece."""
    for piece, shift, pair in zip(pieces, shifts, moments, strict=True):
        _update(piece, shift, temperature, (None, *pair), rule, True)


def _update(piece: Piece, shift: Tensor, temperature: float, places, rule: Adam, takes_a_step: bool) -> None:
    launch(kernels.update_kernel, blocks_of(piece), piece.g, *vectors(piece), piece.logits, piece.mean, shift, *places,
           piece.size, len(piece.task_vectors), *noise(piece, temperature), rule.beta1, rule.beta2, rule.rate,
           rule.root, rule.epsilon, ADAM=takes_a_step, PRODUCT=not piece.task_vectors, SQUARE=temperature == 0.5,
           VECTOR=dtype_of(piece))  # fmt: skip


def blocks_of(piece: Piece) -> int:
    return triton.cdiv(piece.size, BLOCK)


def noise(piece: Piece, temperature: float) -> tuple[int, int, float]:
    """The key's halves as signed words, so that every key has the same type, and 1 / temperature."""
    halves = (piece.key & 0xFFFFFFFF, piece.key >> 32)
    return (*((half ^ 1 << 31) - (1 << 31) for half in halves), 1.0 / temperature)


def vectors(piece: Piece) -> tuple[Tensor | None, Tensor | None]:
    """The addresses of the task vectors, int64 [T], and lambda, fp32 [T], both on the device."""
    if not piece.task_vectors:
        return None, None
    device, addresses = piece.task_vectors[0].device, tuple(x.data_ptr() for x in piece.task_vectors)
    if piece.table is None or piece.table[0] != addresses:
        piece.table = addresses, torch.tensor(addresses, dtype=torch.int64, device=device)
    coefficients = piece.coefficients
    if coefficients is None:
        coefficients = torch.zeros(len(addresses), device=device)
    return piece.table[1], coefficients.to(device, torch.float32).contiguous()


def dtype_of(piece: Piece):
    return DTYPES[piece.task_vectors[0].dtype] if piece.task_vectors else tl.float32
