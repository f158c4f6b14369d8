"""Launches the kernels of several projections of one x: block shapes, grids, and what is left to cuBLAS.

forward   prefill for up to three at once, then cuBLAS for each: 1 + G; with few rows the fused kernel for each: G
backward  partials for each, one finish for up to three at once, cuBLAS for each: 2 G + 1; and dA for each that has one
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
import triton
from torch import Tensor

from peta_fast.ops.linearized_lora import group_kernels, kernels, launch
from peta_fast.ops.linearized_lora.blocks import fused_rows, name_of, padded_rank, place_of
from peta_fast.ops.linearized_lora.group_closed_form import Gradients, Part
from peta_fast.ops.linearized_lora.reference import rows_of

MOST = group_kernels.MOST
PER_PREFILL, PER_FINISH = 13, 14
"""Arguments of a projection."""


def group_prefill_blocks(width: int) -> dict[str, int]:
    """width: bytes of one column of all A0 and dA, padded. Their tiles are what fills the shared memory."""
    if width <= 256:
        return {"BM": 64, "BN": 128, "BK": 64, "num_warps": 4, "num_stages": 3}
    if width <= 512:
        return {"BM": 32, "BN": 64, "BK": 64, "num_warps": 4, "num_stages": 3}
    if width <= 1536:
        BM, stages = (32, 3) if width <= 1024 else (16, 2)
        return {"BM": BM, "BN": 64, "BK": 32, "num_warps": 4, "num_stages": stages}
    return {"BM": 16, "BN": 64, "BK": 16, "num_warps": 8, "num_stages": 2}


def group_finish_blocks(columns: int) -> dict[str, int]:
    """columns: of all v together, padded; they stay in registers while gx's columns pass."""
    if columns <= 128:
        return {"BM": 64, "BN": 64, "BK": 64, "num_warps": 4, "num_stages": 2}
    return {"BM": 32, "BN": 64, "BK": 64 if columns <= 384 else 32, "num_warps": 8, "num_stages": 2}


def forward(x: Tensor, parts: Sequence[Part], *, fused: bool | None = None) -> tuple[list[Tensor], list[Tensor]]:
    """x [*, in] -> of every part y [*, out] and u [*, r]"""
    rows, shape = rows_of(x), x.shape[:-1]
    M = rows.shape[0]
    if fused is None:
        fused = all(M <= fused_rows_of(part) for part in parts)
    if fused:
        found = [launch.forward(x, *part, fused=True) for part in parts]
        return [y for y, _ in found], [u for _, u in found]
    parts = [contiguous(part) for part in parts]
    ys = [rows.new_empty(M, part.weight.shape[0]) for part in parts]
    us = [rows.new_empty(M, part.A0.shape[0]) for part in parts]
    if M:
        for piece in pieces(len(parts)):
            prefill(rows, [(parts[i], ys[i], us[i]) for i in piece])
        for y, part in zip(ys, parts, strict=True):
            y.addmm_(rows, part.weight.t())
    return [y.view(*shape, y.shape[1]) for y in ys], [u.view(*shape, u.shape[1]) for u in us]


def fused_rows_of(part: Part) -> int:
    """Up to how many rows the fused kernel serves the single layer."""
    (N, K), R = part.weight.shape, padded_rank(part.A0.shape[0])
    return fused_rows(part.dA is not None, False, place_of(part.weight.device), N, K, R)


def prefill(rows: Tensor, chosen: Sequence[tuple[Part, Tensor, Tensor]]) -> None:
    """Up to MOST of (part, y, u), whose y and u are written."""
    ranks = [padded_rank(part.A0.shape[0]) for part, _, _ in chosen]
    width = sum(R * (1 + p.general) * p.A0.element_size() for R, (p, _, _) in zip(ranks, chosen, strict=True))
    blocks, (M, K) = group_prefill_blocks(width), rows.shape
    launch.launch(
        group_kernels.group_prefill_kernel, (triton.cdiv(M, blocks["BM"]),), rows, M, K, *rows.stride(),
        *filled([prefill_arguments(*one) for one in chosen], PER_PREFILL), **padded_ranks(ranks), **blocks,
        **launch.numerics(rows),
    )  # fmt: skip


def prefill_arguments(part: Part, y: Tensor, u: Tensor) -> tuple:
    tensors = (part.bias, part.A0, part.dA, part.B0, part.dB, part.seed, y, u)
    return (*tensors, *part.dB.shape, part.scaling, *launch.dropout_arguments(part.dropout))


def backward(
    gys: Sequence[Tensor | None],
    x: Tensor | None,
    us: Sequence[Tensor],
    parts: Sequence[Part],
    needs_x: bool,
    needs_dA: Sequence[bool],
    needs_dB: Sequence[bool],
) -> Gradients:
    """As group_closed_form.backward. Outputs without a gradient cost nothing."""
    parts = [contiguous(part) for part in parts]
    gs = [None if g is None else rows_of(g) for g in gys]
    given = [i for i, g in enumerate(gs) if g is not None]
    shape, g0 = gys[given[0]].shape[:-1], gs[given[0]]
    M, K = g0.shape[0], parts[0].A0.shape[1]
    gx = g0.new_empty(M, K) if needs_x else None
    gdAs = [torch.empty_like(parts[i].dA) if needs_dA[i] and g is not None else None for i, g in enumerate(gs)]
    gdBs = [torch.empty_like(parts[i].dB) if needs_dB[i] and g is not None else None for i, g in enumerate(gs)]
    if M:
        for number, piece in enumerate(pieces(len(given))):
            chosen = [given[j] for j in piece]
            v0s = finish(
                gx, [(parts[i], gs[i], rows_of(us[i]), gdBs[i], gdAs[i] is not None) for i in chosen], adds=number > 0
            )
            for i, v0 in zip(chosen, v0s, strict=True):
                if gdAs[i] is not None:
                    launch.dA_gradient(v0, rows_of(x), parts[i].seed, parts[i].scaling, parts[i].dropout, gdAs[i])
        if gx is not None:
            for i in given:
                gx.addmm_(gs[i], parts[i].weight)
    else:
        for t in (*gdAs, *gdBs):
            if t is not None:
                t.zero_()
    return None if gx is None else gx.view(*shape, K), gdAs, gdBs


def finish(gx: Tensor | None, chosen: Sequence[tuple], adds: bool) -> list[Tensor | None]:
    """Up to MOST of (part, g, u, gdB, needs dA): fills gx (or adds to it) and every gdB; every v0 = g B0, or None."""
    arguments, v0s, columns, gdB_blocks, anything = [], [], 0, 0, False
    (M, _), K = chosen[0][1].shape, chosen[0][0].A0.shape[1]
    ranks = [padded_rank(part.A0.shape[0]) for part, *_ in chosen]
    for part, g, u, gdB, needs_dA in chosen:
        needs_v = gx is not None or needs_dA
        v, gdB_parts, column_ranges, row_ranges = partials(part, g, u, needs_v, gdB is not None)
        v0 = g.new_empty(M, part.A0.shape[0]) if part.general and needs_v else None
        tensors = (v, gdB_parts, part.A0, part.dA, part.seed, v0, gdB)
        numbers = (*part.dB.shape, part.scaling, *launch.dropout_arguments(part.dropout), column_ranges, row_ranges)
        arguments.append((*tensors, *numbers))
        v0s.append(v0)
        columns += padded_rank(part.A0.shape[0]) * (1 + part.general)
        anything |= needs_v
    blocks = group_finish_blocks(columns)
    for part, _, _, gdB, _ in chosen:
        gdB_blocks += 0 if gdB is None else triton.cdiv(part.dB.shape[0], blocks["BN"])
    row_blocks = triton.cdiv(M, blocks["BM"]) if anything else 0
    programs = place_of(chosen[0][1].device).programs
    columns_each = launch.part_of(K, max(1, programs // max(row_blocks, 1)), blocks["BK"]) if gx is not None else K
    row_programs = row_blocks * triton.cdiv(K, columns_each)
    if row_programs + gdB_blocks:
        launch.launch(
            group_kernels.group_finish_kernel, (row_programs + gdB_blocks,), gx, M, K, row_programs, columns_each,
            *filled(arguments, PER_FINISH), ADDS=adds, **padded_ranks(ranks), **blocks,
            **launch.numerics(chosen[0][1]),
        )  # fmt: skip
    return v0s


def partials(
    part: Part, g: Tensor, u: Tensor, needs_v: bool, needs_gdB: bool
) -> tuple[Tensor | None, Tensor | None, int, int]:
    """Parts of v and of gdB from one read of g, each None where it is not needed, and how many there are of each."""
    (M, N), (r, K) = g.shape, part.A0.shape
    R, place, sums = padded_rank(r), place_of(g.device), torch.float64 if g.dtype == torch.float64 else torch.float32

    def run(blocks):
        column_ranges = triton.cdiv(N, blocks["BN"])
        rows_each = launch.part_of(M, max(1, place.programs // column_ranges), blocks["BM"])
        row_ranges = triton.cdiv(M, rows_each)
        v = g.new_empty((column_ranges, 1 + part.general, M, R), dtype=sums) if needs_v else None
        parts = g.new_empty((row_ranges, N, R), dtype=sums) if needs_gdB else None
        if needs_v or needs_gdB:
            launch.launch(
                kernels.partials_kernel, (column_ranges, row_ranges), g, u, part.B0, part.dB, v, parts, M, N, r,
                rows_each, *launch.strides(g, u, part.B0, part.dB), GENERAL=part.general, NEEDS_V=needs_v,
                NEEDS_GDB=needs_gdB, R=R, **blocks, **launch.numerics(g),
            )  # fmt: skip
        return v, parts, column_ranges, row_ranges

    return launch.with_blocks(name_of("partials", part.general), place, (M, N, K, R), run)


def contiguous(part: Part) -> Part:
    """An adapter as it lies in a model is contiguous already."""
    named = {n: t.contiguous() for n in ("bias", "A0", "dA", "B0", "dB") if (t := getattr(part, n)) is not None}
    return part._replace(**named)


def pieces(count: int) -> Iterator[range]:
    """What is launched together."""
    return (range(first, min(first + MOST, count)) for first in range(0, count, MOST))


def filled(arguments: Sequence[tuple], each: int) -> Iterator:
    """One list for the kernel, with None for the projections that there are not."""
    return itertools.chain(*arguments, (None,) * (each * (MOST - len(arguments))))


def padded_ranks(ranks: Sequence[int]) -> dict[str, int]:
    return {f"R{i}": ranks[i] if i < len(ranks) else 16 for i in range(MOST)}
