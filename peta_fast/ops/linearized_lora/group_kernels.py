"""Triton kernels of several linearized LoRA layers of one x; what one layer needs is in kernels.py.

    group_prefill  y_i <- b_i + s_i [p_i dB_iᵀ + t_i B0_iᵀ] and p_i = D_i(x) A0_iᵀ for up to three projections, from one
                   read of x, for matrix multiplications that add x W0_iᵀ to y_i
    group_finish   gx <- sum_i D_i(s_i [v0_i dA_i + (v0_i + vd_i) A0_i]), written once; gdB_i = s_i gyᵢᵀ u_i; and v0_i

A projection that is not there has None for all that it would have; B0 = 0, no bias and no dropout are None as well.
Adapters are contiguous. No atomics: every sum has one order. Bytes of 16-bit tensors beside the base products: prefill
2 M in and, for each, 2 M out; finish 2 M in. G single layers: G times 2 M in more in the prefill, and in the backward
6 (G - 1) M in more, since each of the other gx is written by its finish, read and added.
"""

from __future__ import annotations

import triton
import triton.language as tl

from peta_fast.ops.linearized_lora.kernels import _down, _kept, _store, _tile, _up

MOST = 3
"""Projections of one launch."""


@triton.jit
def _group_down(
    b_x, p, q, rows, k, p_A0, p_dA, p_seed, K, r, threshold,
    R: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """p + D(x) A0ᵀ and q + D(x) dAᵀ for the columns of x [BM, BK] from k on, not yet scaled by 1 / (1 - dropout)"""
    ks = k + tl.arange(0, BK)
    if p_seed is not None:
        b_x = tl.where(_kept(p_seed, rows, k, K, threshold, BM, BK), b_x, 0.0)
    p = _down(b_x, p_A0, ks, r, K, 1, K, p, R, ACC, UPCAST)
    if p_dA is not None:
        q = _down(b_x, p_dA, ks, r, K, 1, K, q, R, ACC, UPCAST)
    return p, q


@triton.jit
def _group_up(
    p, q, rows, p_bias, p_B0, p_dB, p_seed, p_y, p_u, M, N, r, scaling, keep_scale,
    R: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Writes these rows of y [M, N] and of u [M, r]."""
    if p_seed is not None:
        p, q = p * keep_scale, q * keep_scale
    _store(p_u, rows, tl.arange(0, R), r, 1, M, r, p)
    narrow: tl.constexpr = p_y.dtype.element_ty
    n_p, n_t = p.to(narrow), (p + q).to(narrow)
    for n in range(0, N, BN):
        columns = n + tl.arange(0, BN)
        y = _up(n_p, p_dB, columns, r, r, 1, N, tl.zeros((BM, BN), dtype=ACC), R, ACC, UPCAST)
        if p_B0 is not None:
            y = _up(n_t, p_B0, columns, r, r, 1, N, y, R, ACC, UPCAST)
        y *= scaling
        if p_bias is not None:
            y += tl.load(p_bias + columns, mask=columns < N, other=0.0).to(ACC)[None, :]
        _store(p_y, rows, columns, N, 1, M, N, y)


@triton.jit
def group_prefill_kernel(
    p_x, M, K, x_m, x_k,
    p_bias0, p_A00, p_dA0, p_B00, p_dB0, p_seed0, p_y0, p_u0, N0, r0, scaling0, threshold0, keep_scale0,
    p_bias1, p_A01, p_dA1, p_B01, p_dB1, p_seed1, p_y1, p_u1, N1, r1, scaling1, threshold1, keep_scale1,
    p_bias2, p_A02, p_dA2, p_B02, p_dB2, p_seed2, p_y2, p_u2, N2, r2, scaling2, threshold2, keep_scale2,
    R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    ACC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """grid (row blocks,); every y [M, N] and u [M, r] contiguous"""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    a, a_q = tl.zeros((BM, R0), dtype=ACC), tl.zeros((BM, R0), dtype=ACC)
    b, b_q = tl.zeros((BM, R1), dtype=ACC), tl.zeros((BM, R1), dtype=ACC)
    c, c_q = tl.zeros((BM, R2), dtype=ACC), tl.zeros((BM, R2), dtype=ACC)
    for k in range(0, K, BK):
        b_x = _tile(p_x, rows, k + tl.arange(0, BK), x_m, x_k, M, K)  # [BM, BK]
        a, a_q = _group_down(b_x, a, a_q, rows, k, p_A00, p_dA0, p_seed0, K, r0, threshold0, R0, BM, BK, ACC, UPCAST)
        if p_A01 is not None:
            b, b_q = _group_down(
                b_x, b, b_q, rows, k, p_A01, p_dA1, p_seed1, K, r1, threshold1, R1, BM, BK, ACC, UPCAST
            )
        if p_A02 is not None:
            c, c_q = _group_down(
                b_x, c, c_q, rows, k, p_A02, p_dA2, p_seed2, K, r2, threshold2, R2, BM, BK, ACC, UPCAST
            )
    _group_up(
        a, a_q, rows, p_bias0, p_B00, p_dB0, p_seed0, p_y0, p_u0, M, N0, r0, scaling0, keep_scale0,
        R0, BM, BN, ACC, UPCAST,
    )  # fmt: skip
    if p_A01 is not None:
        _group_up(
            b, b_q, rows, p_bias1, p_B01, p_dB1, p_seed1, p_y1, p_u1, M, N1, r1, scaling1, keep_scale1,
            R1, BM, BN, ACC, UPCAST,
        )  # fmt: skip
    if p_A02 is not None:
        _group_up(
            c, c_q, rows, p_bias2, p_B02, p_dB2, p_seed2, p_y2, p_u2, M, N2, r2, scaling2, keep_scale2,
            R2, BM, BN, ACC, UPCAST,
        )  # fmt: skip


@triton.jit
def _group_v(p_v, p_dA, p_v0, rows, first, M, r, column_ranges, R: tl.constexpr, BM: tl.constexpr, ACC: tl.constexpr):
    """g B0 and g dB [BM, R] from their parts over ranges of columns; the first of them goes to v0 once."""
    ranks = tl.arange(0, R)
    v0, vd = tl.zeros((BM, R), dtype=ACC), tl.zeros((BM, R), dtype=ACC)
    for j in range(0, column_ranges):
        if p_dA is not None:
            part = tl.cast(j, tl.int64) * 2
            vd += _tile(p_v + part * M * R, rows, ranks, R, 1, M, R)  # [BM, R]
            v0 += _tile(p_v + (part + 1) * M * R, rows, ranks, R, 1, M, R)  # [BM, R]
        else:
            vd += _tile(p_v + tl.cast(j, tl.int64) * M * R, rows, ranks, R, 1, M, R)  # [BM, R]
    if p_dA is not None:
        if first == 0:
            _store(p_v0, rows, ranks, r, 1, M, r, v0)
    return v0, vd


@triton.jit
def _group_low(
    total, v0, vd, rows, k, p_A0, p_dA, p_seed, K, r, scaling, threshold, keep_scale,
    R: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, NARROW: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """total + D(s [(v0 + vd) A0 + v0 dA]) for the columns [BM, BK] from k on"""
    ks = k + tl.arange(0, BK)
    zero = tl.zeros((BM, BK), dtype=ACC)
    low = _up((v0 + vd).to(NARROW), p_A0, ks, r, 1, K, K, zero, R, ACC, UPCAST)
    if p_dA is not None:
        low = _up(v0.to(NARROW), p_dA, ks, r, 1, K, K, low, R, ACC, UPCAST)
    if p_seed is not None:
        low = tl.where(_kept(p_seed, rows, k, K, threshold, BM, BK), low * keep_scale, 0.0)
    return total + scaling * low


@triton.jit
def _group_gdB(p_parts, p_gdB, block, N, r, scaling, row_ranges, R: tl.constexpr, BN: tl.constexpr, ACC: tl.constexpr):
    """Adds up one block of columns of gdB [N, r]; a block that there is not reads and writes nothing."""
    columns, ranks = block * BN + tl.arange(0, BN), tl.arange(0, R)
    acc = tl.zeros((BN, R), dtype=ACC)
    for i in range(0, row_ranges):
        acc += _tile(p_parts + tl.cast(i, tl.int64) * R * N, columns, ranks, R, 1, N, R)  # [BN, R]
    _store(p_gdB, columns, ranks, r, 1, N, r, scaling * acc)


@triton.jit
def group_finish_kernel(
    p_gx, M, K, row_programs, columns_each,
    p_v0, p_parts0, p_A00, p_dA0, p_seed0, p_at_B00, p_gdB0, N0, r0, scaling0, threshold0, keep_scale0, columns0, rows0,
    p_v1, p_parts1, p_A01, p_dA1, p_seed1, p_at_B01, p_gdB1, N1, r1, scaling1, threshold1, keep_scale1, columns1, rows1,
    p_v2, p_parts2, p_A02, p_dA2, p_seed2, p_at_B02, p_gdB2, N2, r2, scaling2, threshold2, keep_scale2, columns2, rows2,
    ADDS: tl.constexpr, R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """grid (row_programs + column blocks of every gdB,)

    The first row_programs make gx [M, K], each BM rows and columns_each columns, and every v0 = g B0 [M, r]; the others
    add up the gdB [N, r]. All contiguous; columns_each is a multiple of BK. columns_i, rows_i: the numbers of parts of
    v and of gdB. ADDS: gx holds what further projections are added to.
    """
    pid = tl.program_id(0)
    if pid < row_programs:
        ranges_k = tl.cdiv(K, columns_each)
        rows, first = pid // ranges_k * BM + tl.arange(0, BM), pid % ranges_k * columns_each
        if p_v0 is not None:
            a_0, a_d = _group_v(p_v0, p_dA0, p_at_B00, rows, first, M, r0, columns0, R0, BM, ACC)
        if p_v1 is not None:
            b_0, b_d = _group_v(p_v1, p_dA1, p_at_B01, rows, first, M, r1, columns1, R1, BM, ACC)
        if p_v2 is not None:
            c_0, c_d = _group_v(p_v2, p_dA2, p_at_B02, rows, first, M, r2, columns2, R2, BM, ACC)
        if p_gx is not None:
            narrow: tl.constexpr = p_gx.dtype.element_ty
            for k in range(first, tl.minimum(first + columns_each, K), BK):
                total = tl.zeros((BM, BK), dtype=ACC)
                if ADDS:
                    total += _tile(p_gx, rows, k + tl.arange(0, BK), K, 1, M, K)  # [BM, BK]
                total = _group_low(
                    total, a_0, a_d, rows, k, p_A00, p_dA0, p_seed0, K, r0, scaling0, threshold0, keep_scale0,
                    R0, BM, BK, narrow, ACC, UPCAST,
                )  # fmt: skip
                if p_v1 is not None:
                    total = _group_low(
                        total, b_0, b_d, rows, k, p_A01, p_dA1, p_seed1, K, r1, scaling1, threshold1, keep_scale1,
                        R1, BM, BK, narrow, ACC, UPCAST,
                    )  # fmt: skip
                if p_v2 is not None:
                    total = _group_low(
                        total, c_0, c_d, rows, k, p_A02, p_dA2, p_seed2, K, r2, scaling2, threshold2, keep_scale2,
                        R2, BM, BK, narrow, ACC, UPCAST,
                    )  # fmt: skip
                _store(p_gx, rows, k + tl.arange(0, BK), K, 1, M, K, total)
    else:
        block = pid - row_programs
        if p_gdB0 is not None:
            if block < tl.cdiv(N0, BN):
                _group_gdB(p_parts0, p_gdB0, block, N0, r0, scaling0, rows0, R0, BN, ACC)
            block -= tl.cdiv(N0, BN)
        if p_gdB1 is not None:
            if block >= 0:
                if block < tl.cdiv(N1, BN):
                    _group_gdB(p_parts1, p_gdB1, block, N1, r1, scaling1, rows1, R1, BN, ACC)
            block -= tl.cdiv(N1, BN)
        if p_gdB2 is not None:
            if block >= 0:
                _group_gdB(p_parts2, p_gdB2, block, N2, r2, scaling2, rows2, R2, BN, ACC)
