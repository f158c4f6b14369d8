"""Triton kernels of the concrete mask: the passes over one tensor, flat, each program a block of it.

    mean     parts of sum m, fp64
    merge    out = base + sum_t lambda_t (tau_t m) / mean
    reduce   parts of sum g tau_t m, fp64, and g sum_t lambda_t tau_t where PRODUCT
    update   gradient of the logits, stored, or taken as a step of Adam where ADAM

    m = 1 / (1 + ((1 - u) / u · e^-logit)^(1/temperature)): u = k 2^-24, so (1 - u) / u = (2^24 - k) / k

Task vectors come as a table of addresses, so that their number is unbounded and none is copied. No atomics: parts are
summed in one order. m is drawn again in every pass: 120 integer operations on a fourth of the elements. Bytes an
element, T task vectors, all in fp32: mean 4; merge 4 T + 12; reduce 4 T + 8, with PRODUCT 4 more; update with Adam
4 T + 28, after PRODUCT 28.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _words(key_low, key_high, first, BLOCK: tl.constexpr):
    """Philox4x32-10 words of the elements [BLOCK] from `first`, a multiple of 4; see noise.py."""
    low = key_low.to(tl.uint32, bitcast=True).to(tl.uint64)
    seed = (key_high.to(tl.uint32, bitcast=True).to(tl.uint64) << 32) | low
    counters = first // 4 + tl.arange(0, BLOCK // 4)
    c0, c1 = (counters & 0xFFFFFFFF).to(tl.uint32), (counters >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, c0 * 0, c0 * 0)
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCK,))


@triton.jit
def _mask(
    p_logits, o, inside, key_low, key_high, first, inverse_temperature,
    MASKED: tl.constexpr, SQUARE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """m [BLOCK] fp32, and the logits; 1 where there are none"""
    logit = tl.zeros((BLOCK,), tl.float32)
    m = logit + 1.0
    if MASKED:
        logit = tl.load(p_logits + o, mask=inside, other=0.0)
        k = (_words(key_low, key_high, first, BLOCK) >> 8).to(tl.int32)
        k = tl.minimum(tl.maximum(k, 2), 16777214)
        odds = (16777216 - k).to(tl.float32) / k.to(tl.float32)
        if SQUARE:
            r = odds * odds * tl.exp(-2.0 * logit)
        else:
            r = tl.exp((tl.log(odds) - logit) * inverse_temperature)
        m = 1.0 / (1.0 + r)
    return m, logit


@triton.jit
def _vector(p_vectors, t, o, inside, VECTOR: tl.constexpr):
    """Task vector t [BLOCK], fp32"""
    p = tl.load(p_vectors + t).to(tl.pointer_type(VECTOR))
    return tl.load(p + o, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _inverse(p_mean):
    """1 / mean in fp32, 0 where nothing is kept"""
    mean = tl.load(p_mean)
    return tl.where(mean > 0.0, 1.0 / mean, 0.0).to(tl.float32)


@triton.jit
def _place(n, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    o = first + tl.arange(0, BLOCK)
    return first, o, o < n


@triton.jit(do_not_specialize=["key_low", "key_high"])
def mean_kernel(
    p_logits, p_parts, p_mask, n, key_low, key_high, inverse_temperature,
    SAMPLE: tl.constexpr, SQUARE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grid (blocks,); parts [blocks] fp64, or with SAMPLE m itself"""
    first, o, inside = _place(n, BLOCK)
    m, _ = _mask(p_logits, o, inside, key_low, key_high, first, inverse_temperature, True, SQUARE, BLOCK)
    if SAMPLE:
        tl.store(p_mask + o, m, mask=inside)
    else:
        tl.store(p_parts + tl.program_id(0), tl.sum(tl.where(inside, m, 0.0).to(tl.float64), 0))


@triton.jit(do_not_specialize=["key_low", "key_high"])
def merge_kernel(
    p_base, p_vectors, p_coefficients, p_logits, p_mean, p_out, n, T, key_low, key_high, inverse_temperature,
    BASE: tl.constexpr, MASKED: tl.constexpr, SQUARE: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grid (blocks,); adds and rounds in the order of masked_task_arithmetic"""
    first, o, inside = _place(n, BLOCK)
    m, _ = _mask(p_logits, o, inside, key_low, key_high, first, inverse_temperature, MASKED, SQUARE, BLOCK)
    inverse = _inverse(p_mean)
    total = tl.zeros((BLOCK,), tl.float32)
    for t in range(T):
        total += tl.load(p_coefficients + t) * (_vector(p_vectors, t, o, inside, VECTOR) * m * inverse)
    if BASE:
        total = tl.load(p_base + o, mask=inside, other=0.0).to(tl.float32) + total
    tl.store(p_out + o, total.to(p_out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["key_low", "key_high"])
def reduce_kernel(
    p_g, p_vectors, p_coefficients, p_logits, p_parts, p_product, n, T, key_low, key_high, inverse_temperature,
    MASKED: tl.constexpr, PRODUCT: tl.constexpr, SQUARE: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grid (blocks,); parts [blocks, T] fp64"""
    first, o, inside = _place(n, BLOCK)
    m, _ = _mask(p_logits, o, inside, key_low, key_high, first, inverse_temperature, MASKED, SQUARE, BLOCK)
    g = tl.load(p_g + o, mask=inside, other=0.0).to(tl.float32)
    gm = (g * m).to(tl.float64)
    direction = tl.zeros((BLOCK,), tl.float32)
    for t in range(T):
        x = _vector(p_vectors, t, o, inside, VECTOR)
        tl.store(p_parts + tl.program_id(0).to(tl.int64) * T + t, tl.sum(gm * x.to(tl.float64), 0))
        if PRODUCT:
            direction += tl.load(p_coefficients + t) * x
    if PRODUCT:
        tl.store(p_product + o, (g * direction).to(p_product.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["key_low", "key_high"])
def update_kernel(
    p_g, p_vectors, p_coefficients, p_logits, p_mean, p_shift, p_gradient, p_first, p_second,
    n, T, key_low, key_high, inverse_temperature, beta1, beta2, rate, root, epsilon,
    ADAM: tl.constexpr, PRODUCT: tl.constexpr, SQUARE: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grid (blocks,); PRODUCT: g has been multiplied by the merged direction already"""
    first, o, inside = _place(n, BLOCK)
    m, logit = _mask(p_logits, o, inside, key_low, key_high, first, inverse_temperature, True, SQUARE, BLOCK)
    gd = tl.load(p_g + o, mask=inside, other=0.0).to(tl.float32)
    if not PRODUCT:
        direction = tl.zeros((BLOCK,), tl.float32)
        for t in range(T):
            direction += tl.load(p_coefficients + t) * _vector(p_vectors, t, o, inside, VECTOR)
        gd = gd * direction
    shift = tl.load(p_shift).to(tl.float32)
    gradient = (gd * _inverse(p_mean) - shift) * (m * (1.0 - m) * inverse_temperature)
    if ADAM:
        b_first = tl.load(p_first + o, mask=inside, other=0.0) * beta1 + gradient * (1.0 - beta1)
        b_second = tl.load(p_second + o, mask=inside, other=0.0) * beta2 + gradient * gradient * (1.0 - beta2)
        tl.store(p_first + o, b_first, mask=inside)
        tl.store(p_second + o, b_second, mask=inside)
        tl.store(p_logits + o, logit - rate * b_first / (tl.sqrt(b_second) * root + epsilon), mask=inside)
    else:
        tl.store(p_gradient + o, gradient, mask=inside)
