"""Launches the kernels: grids, and the choice between one launch and a launch beside cuBLAS. Block shapes: blocks.py.

    forward   fused, 1 launch; or prefill and cuBLAS, 2
    dual      fused, 1 launch and one pass over W0; or prefill and cuBLAS for x and for dx, 3
    backward  partials, finish, cuBLAS, and dA where B0 is not 0: 3 or 4
              of the dual the same, partials and cuBLAS once more where the value's gradient is not zero

The base product is left to cuBLAS, unless there are so few rows that reading W0 decides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources

from peta_fast.ops.linearized_lora import blocks as tables
from peta_fast.ops.linearized_lora import kernels
from peta_fast.ops.linearized_lora.blocks import INTERPRETED, Place, name_of, padded_rank, place_of
from peta_fast.ops.linearized_lora.dropout import keep_threshold
from peta_fast.ops.linearized_lora.reference import rows_of


def numerics(x: Tensor) -> dict[str, object]:
    """On a GPU sums are fp32 over 16-bit operands; in the interpreter both have the precision that is tested."""
    return {"ACC": tl.float64 if x.dtype == torch.float64 else tl.float32, "UPCAST": INTERPRETED}


def launch(kernel, grid: tuple[int, ...], *arguments, **options) -> None:
    """Every launch of this package's Triton kernels goes through here, where tests count them."""
    with torch.cuda.device_of(next(a for a in arguments if isinstance(a, Tensor))):
        kernel[grid](*arguments, **options)


def with_blocks(kernel: str, place: Place, sizes: tuple[int, int, int, int], work: Callable[[dict], object]):
    """work(blocks) with blocks for which this GPU has room; sizes: M, N, K, R."""
    while True:
        try:
            return work(tables.chosen(kernel, place, *sizes))
        except OutOfResources:
            if not tables.shrink(kernel, place, *sizes):
                raise


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
    R, place, general = padded_rank(r), place_of(x.device), dA is not None
    if fused is None:
        fused = (moved is not None or not dual) and M <= tables.fused_rows(general, dual, place, N, K, R)
    switches = {"GENERAL": general, "DUAL": dual, "BIAS": bias is not None, "DROPOUT": seed is not None}
    sizes = (M, N, K, r, scaling, *dropout_arguments(dropout))

    def run_fused(blocks):
        grid = (triton.cdiv(M, blocks["BM"]) * triton.cdiv(N, blocks["BN"]),)
        launch(
            kernels.fused_kernel, grid, rows, moved, weight, bias, A0, dA, B0, dB, seed, y, dy, u, *sizes,
            *strides(rows, moved, weight, A0, dA, B0, dB), **switches, R=R, **blocks, **numerics(x),
        )  # fmt: skip

    def run_prefill(blocks):
        launch(
            kernels.prefill_kernel, (triton.cdiv(M, blocks["BM"]),), rows, moved, bias, A0, dA, B0, dB, seed, y, dy, u,
            *sizes, *strides(rows, moved, A0, dA, B0, dB), **switches, MOVING=moved is not None, R=R, **blocks,
            **numerics(x),
        )  # fmt: skip

    if M and fused:
        with_blocks(name_of("fused", general, dual), place, (M, N, K, R), run_fused)
    elif M:
        with_blocks(name_of("prefill", general, dual), place, (M, N, K, R), run_prefill)
        y.addmm_(rows, weight.t())
        if moved is not None:
            dy.addmm_(moved, weight.t())
    shape = x.shape[:-1]
    return y.view(*shape, N), None if dy is None else dy.view(*shape, N), u.view(*shape, r)


def backward(gy, x, u, weight, A0, dA, B0, dB, seed, scaling, dropout, needs: Sequence[bool]):
    """The gradients of x, dA and dB, each where `needs` says so, else None."""
    g, K = rows_of(gy), A0.shape[1]
    M = g.shape[0]
    gx = g.new_empty(M, K) if needs[0] else None
    gdA = torch.empty_like(dA, memory_format=torch.contiguous_format) if needs[1] else None
    gdB = torch.empty_like(dB, memory_format=torch.contiguous_format) if needs[2] else None
    if M == 0:
        return tuple(None if t is None else t.zero_() for t in (gx, gdA, gdB))
    v0 = _adapter_gradients(None, g, rows_of(u), A0, dA, B0, dB, seed, scaling, dropout, gx, None, gdB, bool(needs[1]))
    if gx is not None:
        gx.addmm_(g, weight)
        gx = gx.view(*gy.shape[:-1], K)
    if gdA is not None:
        dA_gradient(v0, rows_of(x), seed, scaling, dropout, gdA)
    return gx, gdA, gdB


def dual_backward(gy0, gdy, x, u, weight, A0, dA, B0, dB, scaling, needs: Sequence[bool]):
    """The gradients of x, dx, dA and dB, each where `needs` says so, else None; gy0 None is zero."""
    g, K, general = rows_of(gdy), A0.shape[1], dA is not None
    M, g0 = g.shape[0], None if gy0 is None else rows_of(gy0)
    gx, gdx = (g.new_empty(M, K) if n else None for n in needs[:2])
    gdA = torch.empty_like(dA, memory_format=torch.contiguous_format) if needs[2] else None
    gdB = torch.empty_like(dB, memory_format=torch.contiguous_format) if needs[3] else None
    if M == 0:
        return tuple(None if t is None else t.zero_() for t in (gx, gdx, gdA, gdB))
    of_gdx = gdx if general else None  # with B0 = 0 it is the base product alone
    if any(t is not None for t in (gx, of_gdx, gdA, gdB)):
        tensors = (A0, dA, B0, dB, None, scaling, 0.0)
        v0 = _adapter_gradients(g0, g, rows_of(u), *tensors, gx, of_gdx, gdB, bool(needs[2]), dual=True)
    if gdA is not None:
        dA_gradient(v0, rows_of(x), None, scaling, 0.0, gdA)
    if gx is not None and g0 is not None:
        gx.addmm_(g0, weight)
    if gdx is not None:
        gdx.addmm_(g, weight) if general else torch.mm(g, weight, out=gdx)
    shape = (*gdy.shape[:-1], K)
    return None if gx is None else gx.view(shape), None if gdx is None else gdx.view(shape), gdA, gdB


def dA_gradient(v0, x, seed, scaling, dropout, gdA):
    """Fills gdA = s v0ᵀ D(x)."""
    (M, K), r = x.shape, v0.shape[1]
    R = padded_rank(r)

    def run(blocks):
        launch(
            kernels.dA_kernel, (triton.cdiv(K, blocks["BK"]),), v0, x, seed, gdA, M, K, r, scaling,
            *dropout_arguments(dropout), *strides(v0, x), DROPOUT=seed is not None, R=R, **blocks, **numerics(x),
        )  # fmt: skip

    with_blocks("dA", place_of(x.device), (M, K, K, R), run)


def _adapter_gradients(
    g0, g, u, A0, dA, B0, dB, seed, scaling, dropout, gx, gdx, gdB, needs_dA, *, dual: bool = False
):  # fmt: skip
    """Fills gx, gdx with the adapter's part, and gdB, each unless None; returns v0 = g B0 [M, r], None where B0 = 0.

    dual: g is gdy, and g0 is gy0 or None.
    """
    (M, N), (r, K) = g.shape, A0.shape
    R, general = padded_rank(r), dA is not None
    needs_v = gx is not None or gdx is not None or needs_dA
    with_w = general and g0 is not None and gx is not None
    place, sums = place_of(g.device), torch.float64 if g.dtype == torch.float64 else torch.float32

    def run_partials(blocks):
        column_ranges = triton.cdiv(N, blocks["BN"])
        rows_each = part_of(M, max(1, place.programs // column_ranges), blocks["BM"])
        grid = (column_ranges, triton.cdiv(M, rows_each))
        v = g.new_empty((column_ranges, 2 if general else 1, M, R) if needs_v else (0,), dtype=sums)
        w = g.new_empty((column_ranges, M, R) if with_w else (0,), dtype=sums)
        parts = g.new_empty((grid[1], N, R) if gdB is not None else (0,), dtype=sums)
        common = {"R": R, **blocks, **numerics(g)}
        launch(
            kernels.partials_kernel, grid, g, u, B0, dB, v, parts, M, N, r, rows_each, *strides(g, u, B0, dB),
            GENERAL=general, NEEDS_V=needs_v, NEEDS_GDB=gdB is not None, **common,
        )  # fmt: skip
        if with_w:
            launch(
                kernels.partials_kernel, grid, g0, u, None, B0, w, parts, M, N, r, rows_each,
                *strides(g0, u, None, B0), GENERAL=False, NEEDS_V=True, NEEDS_GDB=False, **common,
            )  # fmt: skip
        return v, w, parts, *grid

    partials = with_blocks(name_of("partials", general), place, (M, N, K, R), run_partials)
    v, w, parts, column_ranges, row_ranges = partials
    v0 = g.new_empty(M, r) if general and needs_v else None
    wide = gx is not None or gdx is not None

    def run_finish(blocks):
        row_blocks = triton.cdiv(M, blocks["BM"]) if needs_v else 0
        columns_each = part_of(K, max(1, place.programs // max(row_blocks, 1)), blocks["BK"]) if wide else K
        row_programs = row_blocks * triton.cdiv(K, columns_each)
        column_blocks = triton.cdiv(N, blocks["BN"]) if gdB is not None else 0
        launch(
            kernels.finish_kernel, (row_programs + column_blocks,), v, w, parts, A0, dA, seed, gx, gdx, v0, gdB, M, N,
            K, r, scaling, *dropout_arguments(dropout), column_ranges, row_ranges, row_programs, columns_each,
            *strides(A0, dA), GENERAL=general, DUAL=dual, WITH_W=with_w, DROPOUT=seed is not None,
            NEEDS_GX=gx is not None, NEEDS_GDX=gdx is not None, R=R, **blocks, **numerics(g),
        )  # fmt: skip

    with_blocks(name_of("finish", general), place, (M, N, K, R), run_finish)
    return v0


def part_of(size: int, ranges: int, block: int) -> int:
    """A multiple of block of which about so many ranges make up the size.

    There are as many ranges as leave a program to each multiprocessor: in partials, fewer are fewer parts of gdB to
    sum; in finish, each sums its rows' parts of v once.
    """
    return triton.cdiv(triton.cdiv(size, ranges), block) * block
