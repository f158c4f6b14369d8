"""Launches the kernels: block shapes, grids, the choice between one launch and a launch beside cuBLAS.

    forward   fused, 1 launch; or prefill and cuBLAS, 2
    dual      fused, 1 launch and one pass over W0; or prefill and cuBLAS for x and for dx, 3
    backward  partials, finish, cuBLAS, and dA where B0 is not 0: 3 or 4

The base product is left to cuBLAS, unless there are so few rows that reading W0 decides.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from peta_fast.ops.linearized_lora import kernels
from peta_fast.ops.linearized_lora.dropout import keep_threshold
from peta_fast.ops.linearized_lora.reference import rows_of

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FUSED_ROWS = 256
"""Up to so many rows the fused kernel runs; beyond, cuBLAS adds the base product to what prefill wrote."""
PROGRAMS = 132
"""What a launch should have at least: the number of multiprocessors of an H100 or H200."""


def padded_rank(r: int) -> int:
    return max(16, triton.next_power_of_2(r))


def fused_blocks(M: int, N: int, R: int, dual: bool = False) -> dict[str, int]:
    """Narrow columns where few rows leave few programs, and no more sums than a program's registers hold."""
    BM = 16 if M <= 16 else 32 if M <= 32 or R > 64 or (dual and R > 16) else 64 if M <= 64 or dual or R > 16 else 128
    BN = 32 if BM <= 32 else 64 if BM == 64 else 128
    warps = 4 if BM * BN <= 4096 and R <= 32 else 8
    BK = 128 if BM <= 32 and R <= 32 and not dual else 64
    return {"BM": BM, "BN": BN, "BK": BK, "GROUP": 8, "num_warps": warps, "num_stages": 3 if dual or R > 32 else 4}


def prefill_blocks(R: int, dual: bool = False) -> dict[str, int]:
    if R > 64:
        return {"BM": 64, "BN": 64, "BK": 32, "num_warps": 8, "num_stages": 3}
    BM = 32 if dual or R > 32 else 64
    return {"BM": BM, "BN": 64 if R > 32 else 128, "BK": 64, "num_warps": 4, "num_stages": 3}


def partials_blocks(R: int) -> dict[str, int]:
    """gdB's part [R, BN] stays in registers; the wider, the fewer parts of v."""
    BN = 256 if R <= 32 else 128
    return {"BM": 64 if R <= 64 else 32, "BN": BN, "num_warps": 8, "num_stages": 3 if R <= 64 else 2}


def finish_blocks(R: int) -> dict[str, int]:
    return {"BM": 64 if R <= 32 else 32, "BN": 64, "BK": 128 if R <= 32 else 64, "num_warps": 4, "num_stages": 2}


def dA_blocks(R: int) -> dict[str, int]:
    return {"BM": 128 if R <= 64 else 64, "BK": 32, "num_warps": 4, "num_stages": 4}


def numerics(x: Tensor) -> dict[str, object]:
    """On a GPU sums are fp32 over 16-bit operands; in the interpreter both have the precision that is tested."""
    return {"ACC": tl.float64 if x.dtype == torch.float64 else tl.float32, "UPCAST": INTERPRETED}


def launch(kernel, grid: tuple[int, ...], *arguments, **options) -> None:
    """Every launch of this package's Triton kernels goes through here, where tests count them."""
    kernel[grid](*arguments, **options)


def strides(*tensors: Tensor | None) -> list[int]:
    return [s for t in tensors for s in ((0, 0) if t is None else t.stride())]


def dropout_arguments(dropout: float) -> tuple[int, float]:
    return keep_threshold(dropout), 1.0 / (1.0 - dropout) if dropout < 1.0 else 0.0


def forward(x, weight, bias, A0, dA, B0, dB, seed, scaling, dropout, *, fused: bool | None = None):
    """y [*, out], u [*, r]"""
    y, _, u = _forward(x, None, weight, bias, A0, dA, B0, dB, seed, scaling, dropout, False, fused)
    return y, u


def dual(x, dx, weight, bias, A0, dA, B0, dB, scaling, *, fused: bool | None = None):
    """y0, dy [*, out], u [*, r]"""
    return _forward(x, dx, weight, bias, A0, dA, B0, dB, None, scaling, 0.0, True, fused and dx is not None)


def _forward(x, dx, weight, bias, A0, dA, B0, dB, seed, scaling, dropout, dual, fused):
    rows, moved = rows_of(x), None if dx is None else rows_of(dx)
    (M, K), N, r = rows.shape, weight.shape[0], A0.shape[0]
    y, u = x.new_empty(M, N), x.new_empty(M, r)
    dy = x.new_empty(M, N) if dual else None
    R = padded_rank(r)
    if fused is None:
        fused = M <= FUSED_ROWS and (moved is not None or not dual)
    switches = {"GENERAL": dA is not None, "DUAL": dual, "BIAS": bias is not None, "DROPOUT": seed is not None}
    sizes = (M, N, K, r, scaling, *dropout_arguments(dropout))
    if M and fused:
        blocks = fused_blocks(M, N, R, dual)
        grid = (triton.cdiv(M, blocks["BM"]) * triton.cdiv(N, blocks["BN"]),)
        launch(
            kernels.fused_kernel, grid, rows, moved, weight, bias, A0, dA, B0, dB, seed, y, dy, u, *sizes,
            *strides(rows, moved, weight, A0, dA, B0, dB), **switches, R=R, **blocks, **numerics(x),
        )  # fmt: skip
    elif M:
        blocks = prefill_blocks(R, dual)
        launch(
            kernels.prefill_kernel, (triton.cdiv(M, blocks["BM"]),), rows, moved, bias, A0, dA, B0, dB, seed, y, dy, u,
            *sizes, *strides(rows, moved, A0, dA, B0, dB), **switches, MOVING=moved is not None, R=R, **blocks,
            **numerics(x),
        )  # fmt: skip
        y.addmm_(rows, weight.t())
        if moved is not None:
            dy.addmm_(moved, weight.t())
    shape = x.shape[:-1]
    return y.view(*shape, N), None if dy is None else dy.view(*shape, N), u.view(*shape, r)


def backward(gy, x, u, weight, A0, dA, B0, dB, seed, scaling, dropout, needs: Sequence[bool]):
    """The gradients of x, dA and dB, each where `needs` says so, else None."""
    g, (r, K) = rows_of(gy), A0.shape
    M, R = g.shape[0], padded_rank(r)
    gx = g.new_empty(M, K) if needs[0] else None
    gdA = torch.empty_like(dA, memory_format=torch.contiguous_format) if needs[1] else None
    gdB = torch.empty_like(dB, memory_format=torch.contiguous_format) if needs[2] else None
    if M == 0:
        return tuple(None if t is None else t.zero_() for t in (gx, gdA, gdB))
    v0 = _adapter_gradients(g, rows_of(u), A0, dA, B0, dB, seed, scaling, dropout, gx, gdB, bool(needs[1]))
    if gx is not None:
        gx.addmm_(g, weight)
        gx = gx.view(*gy.shape[:-1], K)
    if gdA is not None:
        blocks, rows = dA_blocks(R), rows_of(x)
        launch(
            kernels.dA_kernel, (triton.cdiv(K, blocks["BK"]),), v0, rows, seed, gdA, M, K, r, scaling,
            *dropout_arguments(dropout), *strides(v0, rows), DROPOUT=seed is not None, R=R, **blocks, **numerics(g),
        )  # fmt: skip
    return gx, gdA, gdB


def _adapter_gradients(g, u, A0, dA, B0, dB, seed, scaling, dropout, gx, gdB, needs_dA):
    """Fills gx with the adapter's part and gdB, each unless None; returns v0 = g B0 [M, r], None where B0 = 0."""
    (M, N), (r, K) = g.shape, A0.shape
    R, general, needs_v = padded_rank(r), dA is not None, gx is not None or needs_dA
    blocks, sums = partials_blocks(R), torch.float64 if g.dtype == torch.float64 else torch.float32
    column_ranges = triton.cdiv(N, blocks["BN"])
    rows_each = rows_of_a_range(M, column_ranges, blocks["BM"])
    row_ranges = triton.cdiv(M, rows_each)
    v = g.new_empty((column_ranges, 2 if general else 1, M, R) if needs_v else (0,), dtype=sums)
    parts = g.new_empty((row_ranges, N, R) if gdB is not None else (0,), dtype=sums)
    launch(
        kernels.partials_kernel, (column_ranges, row_ranges), g, u, B0, dB, v, parts, M, N, r, rows_each,
        *strides(g, u, B0, dB), GENERAL=general, NEEDS_V=needs_v, NEEDS_GDB=gdB is not None, R=R, **blocks,
        **numerics(g),
    )  # fmt: skip
    v0 = g.new_empty(M, r) if general and needs_v else None
    blocks = finish_blocks(R)
    row_blocks = triton.cdiv(M, blocks["BM"]) if needs_v else 0
    columns_each = columns_of_a_range(K, row_blocks, blocks["BK"]) if gx is not None else K
    row_programs = row_blocks * triton.cdiv(K, columns_each)
    column_blocks = triton.cdiv(N, blocks["BN"]) if gdB is not None else 0
    launch(
        kernels.finish_kernel, (row_programs + column_blocks,), v, parts, A0, dA, seed, gx, v0, gdB, M, N, K, r,
        scaling, *dropout_arguments(dropout), column_ranges, row_ranges, row_programs, columns_each, *strides(A0, dA),
        GENERAL=general, DROPOUT=seed is not None, NEEDS_GX=gx is not None, R=R, **blocks, **numerics(g),
    )  # fmt: skip
    return v0


def rows_of_a_range(M: int, column_ranges: int, BM: int) -> int:
    """A multiple of BM that leaves about PROGRAMS programs: fewer ranges are fewer parts of gdB to sum."""
    ranges = max(1, PROGRAMS // column_ranges)
    return triton.cdiv(triton.cdiv(M, ranges), BM) * BM


def columns_of_a_range(K: int, row_blocks: int, BK: int) -> int:
    """A multiple of BK that leaves about PROGRAMS programs, each of which sums its rows' parts of v once."""
    ranges = max(1, PROGRAMS // max(row_blocks, 1))
    return triton.cdiv(triton.cdiv(K, ranges), BK) * BK
