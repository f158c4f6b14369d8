"""Triton kernels of linearized LoRA.

    fused      y  = x W0ᵀ + b + s [p dBᵀ + t B0ᵀ],  p = D(x) A0ᵀ, t = p + D(x) dAᵀ, in one launch: p and t grow beside
               the accumulator from the tiles of x that are there anyway. Dual: a second accumulator shares W0's tiles.
    prefill    y <- b + s [p dBᵀ + t B0ᵀ] and p, for a matrix multiplication that adds x W0ᵀ to y
    partials   parts of g B0, g dB (over ranges of columns) and of gᵀ u (over ranges of rows) from one read of g
    finish     sums the parts in a fixed order: gx <- D(s [v0 dA + (v0 + vd) A0]), gdB = s gᵀ u, and v0 for gdA.
               Dual, of g = gdy and w = gy0 B0: gx <- s [v0 dA + (w + vd) A0], gdx <- s v0 A0
    dA         gdA = s v0ᵀ D(x)

No atomics: every sum has one order. Products accumulate in ACC (fp32 on a GPU); with UPCAST operands are taken to ACC
before they meet, since the interpreter multiplies the bits of bf16. tl.dot wants 16 of a size, so R is the rank, padded
with zeros. Bytes of 16-bit tensors beside the base product: prefill 2 M (in + out), and 2 M out again when y is added
to; partials 2 M out; finish 2 M in, and 2 M in again; dA 2 M in.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _dot(a, b, acc, ACC: tl.constexpr, UPCAST: tl.constexpr):
    """acc + a b"""
    if UPCAST:
        return acc + tl.dot(a.to(ACC), b.to(ACC), input_precision="ieee", out_dtype=ACC)
    return tl.dot(a, b, acc)


@triton.jit
def _tile(p, rows, columns, stride_r, stride_c, n_rows, n_columns):
    """[rows, columns] of a matrix, zero outside; rows may lie beyond 2^31 elements."""
    m = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
    return tl.load(
        p + rows[:, None].to(tl.int64) * stride_r + columns[None, :].to(tl.int64) * stride_c, mask=m, other=0.0
    )


@triton.jit
def _store(p, rows, columns, stride_r, stride_c, n_rows, n_columns, value):
    m = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
    o = rows[:, None].to(tl.int64) * stride_r + columns[None, :].to(tl.int64) * stride_c
    tl.store(p + o, value.to(p.dtype.element_ty), mask=m)


@triton.jit
def _kept(p_seed, rows, first_column, n_columns, threshold, BM: tl.constexpr, BK: tl.constexpr):
    """Whether dropout keeps the elements [BM, BK] that begin at first_column, a multiple of 4; see dropout.py."""
    seed = tl.load(p_seed).to(tl.uint64, bitcast=True)
    blocks = first_column // 4 + tl.arange(0, BK // 4)
    counters = rows[:, None].to(tl.int64) * ((n_columns + 3) // 4) + blocks[None, :]  # [BM, BK / 4]
    low, high = (counters & 0xFFFFFFFF).to(tl.uint32), (counters >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, low, high, high * 0, high * 0)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BM, BK))
    return (words >> 8).to(tl.int32) < threshold


@triton.jit
def _down(
    x, p_A, columns, r, stride_r, stride_c, n_columns, acc, R: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr
):
    """acc + x Aᵀ for these columns of x [BM, BK] and A [r, in]; A may be of another dtype."""
    ranks = tl.arange(0, R)
    m = (columns < n_columns)[:, None] & (ranks < r)[None, :]
    a = tl.load(
        p_A + columns[:, None].to(tl.int64) * stride_c + ranks[None, :] * stride_r, mask=m, other=0.0
    )  # [BK, R]
    return _dot(x, a.to(x.dtype), acc, ACC, UPCAST)


@triton.jit
def _up(
    p, p_B, columns, r, stride_c, stride_r, n_columns, acc, R: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr
):
    """acc + p Bᵀ for these columns of y; p [BM, R], B [out, r]"""
    ranks = tl.arange(0, R)
    m = (ranks < r)[:, None] & (columns < n_columns)[None, :]
    b = tl.load(
        p_B + columns[None, :].to(tl.int64) * stride_c + ranks[:, None] * stride_r, mask=m, other=0.0
    )  # [R, BN]
    return _dot(p, b.to(p.dtype), acc, ACC, UPCAST)


@triton.jit
def fused_kernel(
    p_x, p_dx, p_W, p_bias, p_A0, p_dA, p_B0, p_dB, p_seed, p_y, p_dy, p_u,
    M, N, K, r, scaling, threshold, keep_scale,
    x_m, x_k, dx_m, dx_k, W_n, W_k, A0_r, A0_k, dA_r, dA_k, B0_n, B0_r, dB_n, dB_r,
    GENERAL: tl.constexpr, DUAL: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    R: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    ACC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """grid (row blocks · column blocks,); y, dy [M, N] and u [M, r] contiguous"""
    # neighbours share rows of x and W0 in the second-level cache: GROUP row blocks go through all columns together
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    pid = tl.program_id(0)
    group = pid // (GROUP * tiles_n)
    group_size = tl.minimum(tiles_m - group * GROUP, GROUP)
    pid_m = group * GROUP + pid % (GROUP * tiles_n) % group_size
    pid_n = pid % (GROUP * tiles_n) // group_size

    rows, columns = pid_m * BM + tl.arange(0, BM), pid_n * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), dtype=ACC)
    p = tl.zeros((BM, R), dtype=ACC)  # D(x) A0ᵀ
    q = tl.zeros((BM, R), dtype=ACC)  # D(x) dAᵀ, and in the dual dx A0ᵀ besides
    dacc = acc
    for k in range(0, K, BK):
        ks = k + tl.arange(0, BK)
        b_x = _tile(p_x, rows, ks, x_m, x_k, M, K)  # [BM, BK]
        b_W = _tile(p_W, ks, columns, W_k, W_n, K, N)  # [BK, BN]
        acc = _dot(b_x, b_W, acc, ACC, UPCAST)
        b_d = b_x
        if DROPOUT:
            b_d = tl.where(_kept(p_seed, rows, k, K, threshold, BM, BK), b_x, 0.0)
        p = _down(b_d, p_A0, ks, r, A0_r, A0_k, K, p, R, ACC, UPCAST)
        if GENERAL:
            q = _down(b_d, p_dA, ks, r, dA_r, dA_k, K, q, R, ACC, UPCAST)
        if DUAL:
            b_dx = _tile(p_dx, rows, ks, dx_m, dx_k, M, K)  # [BM, BK]
            dacc = _dot(b_dx, b_W, dacc, ACC, UPCAST)
            if GENERAL:
                q = _down(b_dx, p_A0, ks, r, A0_r, A0_k, K, q, R, ACC, UPCAST)
    if DROPOUT:
        p, q = p * keep_scale, q * keep_scale
    if pid_n == 0:
        _store(p_u, rows, tl.arange(0, R), r, 1, M, r, p)
    narrow: tl.constexpr = p_x.dtype.element_ty
    low = _up(p.to(narrow), p_dB, columns, r, dB_n, dB_r, N, tl.zeros((BM, BN), dtype=ACC), R, ACC, UPCAST)
    if DUAL:
        if GENERAL:
            low = _up(q.to(narrow), p_B0, columns, r, B0_n, B0_r, N, low, R, ACC, UPCAST)
            zero = tl.zeros((BM, BN), dtype=ACC)
            acc += scaling * _up(p.to(narrow), p_B0, columns, r, B0_n, B0_r, N, zero, R, ACC, UPCAST)
        _store(p_dy, rows, columns, N, 1, M, N, dacc + scaling * low)
    else:
        if GENERAL:
            low = _up((p + q).to(narrow), p_B0, columns, r, B0_n, B0_r, N, low, R, ACC, UPCAST)
        acc += scaling * low
    if BIAS:
        acc += tl.load(p_bias + columns, mask=columns < N, other=0.0).to(ACC)[None, :]
    _store(p_y, rows, columns, N, 1, M, N, acc)


@triton.jit
def prefill_kernel(
    p_x, p_dx, p_bias, p_A0, p_dA, p_B0, p_dB, p_seed, p_y, p_dy, p_u,
    M, N, K, r, scaling, threshold, keep_scale,
    x_m, x_k, dx_m, dx_k, A0_r, A0_k, dA_r, dA_k, B0_n, B0_r, dB_n, dB_r,
    GENERAL: tl.constexpr, DUAL: tl.constexpr, MOVING: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    R: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    ACC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """grid (row blocks,); y, dy [M, N] and u [M, r] contiguous. MOVING: the dual has a dx."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    p = tl.zeros((BM, R), dtype=ACC)
    q = tl.zeros((BM, R), dtype=ACC)
    for k in range(0, K, BK):
        ks = k + tl.arange(0, BK)
        b_x = _tile(p_x, rows, ks, x_m, x_k, M, K)  # [BM, BK]
        if DROPOUT:
            b_x = tl.where(_kept(p_seed, rows, k, K, threshold, BM, BK), b_x, 0.0)
        p = _down(b_x, p_A0, ks, r, A0_r, A0_k, K, p, R, ACC, UPCAST)
        if GENERAL:
            q = _down(b_x, p_dA, ks, r, dA_r, dA_k, K, q, R, ACC, UPCAST)
            if MOVING:
                b_dx = _tile(p_dx, rows, ks, dx_m, dx_k, M, K)  # [BM, BK]
                q = _down(b_dx, p_A0, ks, r, A0_r, A0_k, K, q, R, ACC, UPCAST)
    if DROPOUT:
        p, q = p * keep_scale, q * keep_scale
    _store(p_u, rows, tl.arange(0, R), r, 1, M, r, p)
    narrow: tl.constexpr = p_x.dtype.element_ty
    n_p = p.to(narrow)
    n_q = q.to(narrow) if DUAL else (p + q).to(narrow)
    for n in range(0, N, BN):
        columns = n + tl.arange(0, BN)
        low = _up(n_p, p_dB, columns, r, dB_n, dB_r, N, tl.zeros((BM, BN), dtype=ACC), R, ACC, UPCAST)
        if GENERAL:
            low = _up(n_q, p_B0, columns, r, B0_n, B0_r, N, low, R, ACC, UPCAST)
        y = low
        if DUAL:
            _store(p_dy, rows, columns, N, 1, M, N, scaling * low)
            y = tl.zeros((BM, BN), dtype=ACC)
            if GENERAL:
                y = _up(n_p, p_B0, columns, r, B0_n, B0_r, N, y, R, ACC, UPCAST)
        y *= scaling
        if BIAS:
            y += tl.load(p_bias + columns, mask=columns < N, other=0.0).to(ACC)[None, :]
        _store(p_y, rows, columns, N, 1, M, N, y)


@triton.jit
def partials_kernel(
    p_g, p_u, p_B0, p_dB, p_v, p_gdB,
    M, N, r, rows_each, g_m, g_n, u_m, u_r, B0_n, B0_r, dB_n, dB_r,
    GENERAL: tl.constexpr, NEEDS_V: tl.constexpr, NEEDS_GDB: tl.constexpr,
    R: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """grid (column ranges of BN, row ranges of rows_each, a multiple of BM)

    v    [column ranges, 2 if GENERAL else 1, M, R]  g dB, then g B0, over one range of columns
    gdB  [row ranges, N, R]                          gᵀ u over one range of rows
    """
    columns, ranks = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, R)
    narrow: tl.constexpr = p_g.dtype.element_ty
    if NEEDS_V:
        b_dB = _tile(p_dB, columns, ranks, dB_n, dB_r, N, r).to(narrow)  # [BN, R]
        if GENERAL:
            b_B0 = _tile(p_B0, columns, ranks, B0_n, B0_r, N, r).to(narrow)  # [BN, R]
    VECTORS: tl.constexpr = 2 if GENERAL else 1
    part = tl.program_id(0).to(tl.int64) * VECTORS
    acc = tl.zeros((BN, R), dtype=ACC)
    first = tl.program_id(1) * rows_each
    for m in range(first, tl.minimum(first + rows_each, M), BM):
        rows = m + tl.arange(0, BM)
        b_g = _tile(p_g, rows, columns, g_m, g_n, M, N)  # [BM, BN]
        if NEEDS_GDB:
            b_u = _tile(p_u, rows, ranks, u_m, u_r, M, r)  # [BM, R]
            acc = _dot(tl.trans(b_g), b_u, acc, ACC, UPCAST)
        if NEEDS_V:
            zero = tl.zeros((BM, R), dtype=ACC)
            _store(p_v + part * M * R, rows, ranks, R, 1, M, R, _dot(b_g, b_dB, zero, ACC, UPCAST))
            if GENERAL:
                _store(p_v + (part + 1) * M * R, rows, ranks, R, 1, M, R, _dot(b_g, b_B0, zero, ACC, UPCAST))
    if NEEDS_GDB:
        _store(p_gdB + tl.program_id(1).to(tl.int64) * R * N, columns, ranks, R, 1, N, R, acc)


@triton.jit
def finish_kernel(
    p_v, p_w, p_gdB_parts, p_A0, p_dA, p_seed, p_gx, p_gdx, p_v0, p_gdB,
    M, N, K, r, scaling, threshold, keep_scale, column_ranges, row_ranges, row_programs, columns_each,
    A0_r, A0_k, dA_r, dA_k,
    GENERAL: tl.constexpr, DUAL: tl.constexpr, WITH_W: tl.constexpr, DROPOUT: tl.constexpr,
    NEEDS_GX: tl.constexpr, NEEDS_GDX: tl.constexpr,
    R: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """grid (row_programs + column blocks of gdB,)

    The first row_programs make gx and gdx [M, K], each BM rows and columns_each columns, and v0 = g B0 [M, r]; the
    others add up gdB [N, r]. All contiguous; columns_each is a multiple of BK.
    w [column ranges, M, R], with WITH_W: parts of gy0 B0
    """
    pid, ranks = tl.program_id(0), tl.arange(0, R)
    if pid < row_programs:
        ranges_k = tl.cdiv(K, columns_each)
        rows, first = pid // ranges_k * BM + tl.arange(0, BM), pid % ranges_k * columns_each
        VECTORS: tl.constexpr = 2 if GENERAL else 1
        vd = tl.zeros((BM, R), dtype=ACC)
        v0 = tl.zeros((BM, R), dtype=ACC)
        for j in range(0, column_ranges):
            part = tl.cast(j, tl.int64) * VECTORS
            vd += _tile(p_v + part * M * R, rows, ranks, R, 1, M, R)  # [BM, R]
            if GENERAL:
                v0 += _tile(p_v + (part + 1) * M * R, rows, ranks, R, 1, M, R)  # [BM, R]
            if WITH_W:
                vd += _tile(p_w + tl.cast(j, tl.int64) * M * R, rows, ranks, R, 1, M, R)  # [BM, R]
        if GENERAL:
            if first == 0:
                _store(p_v0, rows, ranks, r, 1, M, r, v0)
        if NEEDS_GX or NEEDS_GDX:
            narrow: tl.constexpr = p_gx.dtype.element_ty if NEEDS_GX else p_gdx.dtype.element_ty
            lead = vd if DUAL else v0 + vd
            for k in range(first, tl.minimum(first + columns_each, K), BK):
                ks = k + tl.arange(0, BK)
                zero = tl.zeros((BM, BK), dtype=ACC)
                if NEEDS_GX:
                    low = _up(lead.to(narrow), p_A0, ks, r, A0_k, A0_r, K, zero, R, ACC, UPCAST)
                    if GENERAL:
                        low = _up(v0.to(narrow), p_dA, ks, r, dA_k, dA_r, K, low, R, ACC, UPCAST)
                    low *= scaling
                    if DROPOUT:
                        low = tl.where(_kept(p_seed, rows, k, K, threshold, BM, BK), low * keep_scale, 0.0)
                    _store(p_gx, rows, ks, K, 1, M, K, low)
                if NEEDS_GDX:
                    low = scaling * _up(v0.to(narrow), p_A0, ks, r, A0_k, A0_r, K, zero, R, ACC, UPCAST)
                    _store(p_gdx, rows, ks, K, 1, M, K, low)
    else:
        columns = (pid - row_programs) * BN + tl.arange(0, BN)
        acc = tl.zeros((BN, R), dtype=ACC)
        for i in range(0, row_ranges):
            acc += _tile(p_gdB_parts + tl.cast(i, tl.int64) * R * N, columns, ranks, R, 1, N, R)  # [BN, R]
        _store(p_gdB, columns, ranks, r, 1, N, r, scaling * acc)


@triton.jit
def dA_kernel(
    p_v0, p_x, p_seed, p_gdA,
    M, K, r, scaling, threshold, keep_scale, v_m, v_r, x_m, x_k,
    DROPOUT: tl.constexpr,
    R: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """grid (column blocks,); gdA [r, K] contiguous. One program sums over all rows of its columns."""
    first, ranks = tl.program_id(0) * BK, tl.arange(0, R)
    ks = first + tl.arange(0, BK)
    acc = tl.zeros((R, BK), dtype=ACC)
    for m in range(0, M, BM):
        rows = m + tl.arange(0, BM)
        b_x = _tile(p_x, rows, ks, x_m, x_k, M, K)  # [BM, BK]
        if DROPOUT:
            b_x = tl.where(_kept(p_seed, rows, first, K, threshold, BM, BK), b_x, 0.0)
        b_v = _tile(p_v0, ranks, rows, v_r, v_m, r, M)  # [R, BM]
        acc = _dot(b_v.to(b_x.dtype), b_x, acc, ACC, UPCAST)
    if DROPOUT:
        acc *= keep_scale
    _store(p_gdA, ranks, ks, K, 1, r, K, scaling * acc)
