// One vector vocabulary for every instruction set, by compiler vector types. Included only by variant files, each of
// which is compiled with its own flags; everything here is static and always inlined, so no symbol can leak.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#include "dtype.h"

#define PF_INLINE static inline __attribute__((always_inline))
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are only passed to inlined functions

#if defined(__AVX512F__)
static constexpr int W = 16;
#elif defined(__AVX2__)
static constexpr int W = 8;
#else
static constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));
typedef int16_t vs __attribute__((vector_size(W * 4)));

PF_INLINE vf splat(float x) { return x - vf{}; }
PF_INLINE vi splat_i(int32_t x) { return x - vi{}; }
PF_INLINE vi iota() {
  vi v;
  for (int i = 0; i < W; ++i) v[i] = i;
  return v;
}
PF_INLINE vi abs_bits(vf x) { return (vi)x & int32_t(kAbsMask); }  // never negative, so signed compares order |x|

// vm: one truth a lane. AVX-512 has registers for it; elsewhere it is all ones or all zeros.
#if defined(__AVX512F__)
typedef __mmask16 vm;
PF_INLINE vm none() { return 0; }
PF_INLINE vm gt(vf a, vf b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ); }
PF_INLINE vm eq(vf a, vf b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_EQ_OQ); }
PF_INLINE vm gt(vi a, vi b) { return _mm512_cmpgt_epi32_mask((__m512i)a, (__m512i)b); }
PF_INLINE vm eq(vi a, vi b) { return _mm512_cmpeq_epi32_mask((__m512i)a, (__m512i)b); }
PF_INLINE vm at_most_where(vm m, vi a, vi b) { return _mm512_mask_cmple_epi32_mask(m, (__m512i)a, (__m512i)b); }
PF_INLINE vm both(vm a, vm b) { return vm(a & b); }
PF_INLINE vm either(vm a, vm b) { return vm(a | b); }
PF_INLINE vm no(vm a) { return vm(~a); }
PF_INLINE vf select(vm m, vf a, vf b) { return (vf)_mm512_mask_blend_ps(m, (__m512)b, (__m512)a); }
PF_INLINE vi select(vm m, vi a, vi b) { return (vi)_mm512_mask_blend_epi32(m, (__m512i)b, (__m512i)a); }
PF_INLINE vf only(vm m, vf a) { return (vf)_mm512_maskz_mov_ps(m, (__m512)a); }
PF_INLINE vf add_where(vm m, vf s, vf a) { return (vf)_mm512_mask_add_ps((__m512)s, m, (__m512)s, (__m512)a); }
PF_INLINE vf flip_where(vm m, vf a) {
  return (vf)_mm512_mask_xor_epi32((__m512i)a, m, (__m512i)a, _mm512_set1_epi32(INT32_MIN));
}
PF_INLINE vf with_sign_times(vf a, vf b) {  // a with its sign times that of b
  return (vf)_mm512_ternarylogic_epi32((__m512i)a, (__m512i)b, _mm512_set1_epi32(INT32_MIN), 0x78);
}
PF_INLINE vf mul_where(vm m, vf a, vf b) { return (vf)_mm512_maskz_mul_ps(m, (__m512)a, (__m512)b); }
PF_INLINE vf divide_where(vm m, vf a, vf b) { return (vf)_mm512_mask_div_ps((__m512)a, m, (__m512)a, (__m512)b); }
PF_INLINE vi max_i(vi a, vi b) { return (vi)_mm512_max_epi32((__m512i)a, (__m512i)b); }
PF_INLINE vs max_s(vs a, vs b) { return (vs)_mm512_max_epi16((__m512i)a, (__m512i)b); }
// x, but NaN where `by` is not finite, and -0 where it is 0 if kZeroToo.
template <bool kZeroToo>
PF_INLINE vf where_clear(vf by, vf x) {
  const int by_class = kZeroToo ? 0x00330733 : 0x00330033;  // NaN, NaN, 0, 1, -inf, inf, negative, positive, upwards
  return (vf)_mm512_fixupimm_ps((__m512)x, (__m512)by, _mm512_set1_epi32(by_class), 0);
}
PF_INLINE uint32_t lanes(vm m) { return m; }
PF_INLINE vm from_lanes(uint32_t set) { return vm(set); }
#else
typedef vi vm;
PF_INLINE vm none() { return vi{}; }
PF_INLINE vm gt(vf a, vf b) { return a > b; }
PF_INLINE vm eq(vf a, vf b) { return a == b; }
PF_INLINE vm gt(vi a, vi b) { return a > b; }
PF_INLINE vm eq(vi a, vi b) { return a == b; }
PF_INLINE vm at_most_where(vm m, vi a, vi b) { return m & (a <= b); }
PF_INLINE vm both(vm a, vm b) { return a & b; }
PF_INLINE vm either(vm a, vm b) { return a | b; }
PF_INLINE vm no(vm a) { return ~a; }
PF_INLINE vf select(vm m, vf a, vf b) { return m ? a : b; }
PF_INLINE vi select(vm m, vi a, vi b) { return m ? a : b; }
PF_INLINE vf only(vm m, vf a) { return (vf)((vi)a & m); }
PF_INLINE vf add_where(vm m, vf s, vf a) { return m ? s + a : s; }
PF_INLINE vf flip_where(vm m, vf a) { return (vf)((vi)a ^ (m & INT32_MIN)); }
PF_INLINE vf with_sign_times(vf a, vf b) { return (vf)((vi)a ^ ((vi)b & INT32_MIN)); }
PF_INLINE vf mul_where(vm m, vf a, vf b) { return (vf)((vi)(a * b) & m); }         // 0 elsewhere
PF_INLINE vf divide_where(vm m, vf a, vf b) { return a / select(m, b, splat(1.0f)); }  // a elsewhere
PF_INLINE vi max_i(vi a, vi b) { return a > b ? a : b; }
PF_INLINE vs max_s(vs a, vs b) { return a > b ? a : b; }
template <bool kZeroToo>
PF_INLINE vf where_clear(vf by, vf x) {
  if (kZeroToo) x = select(eq(by, vf{}), -vf{}, x);
  return select(eq(by * vf{}, vf{}), x, (vf)splat_i(kNanBits));
}
PF_INLINE uint32_t lanes(vm m) {
#if defined(__AVX2__)
  return uint32_t(_mm256_movemask_ps((__m256)m));
#elif defined(__x86_64__)
  return uint32_t(_mm_movemask_ps((__m128)m));
#else
  uint32_t set = 0;
  for (int i = 0; i < W; ++i) set |= uint32_t(m[i] & 1) << i;
  return set;
#endif
}
PF_INLINE vm from_lanes(uint32_t set) {
  vm m;
  for (int i = 0; i < W; ++i) m[i] = -int32_t(set >> i & 1);
  return m;
}
#endif

// a b + c rounded once, in every variant the same bits.
#if defined(__AVX512F__)
PF_INLINE vf fused(vf a, vf b, vf c) { return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
#elif defined(__FMA__)
PF_INLINE vf fused(vf a, vf b, vf c) { return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
#elif defined(__aarch64__)
PF_INLINE vf fused(vf a, vf b, vf c) { return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
#else
typedef double vd __attribute__((vector_size(W * 8)));
typedef int64_t vl __attribute__((vector_size(W * 8)));
// The product is exact in double; the sum is rounded to odd there, so that rounding it again does no harm.
PF_INLINE vf fused(vf a, vf b, vf c) {
  const vd p = __builtin_convertvector(a, vd) * __builtin_convertvector(b, vd), d = __builtin_convertvector(c, vd);
  const vd sum = p + d, back = sum - p, error = (p - (sum - back)) + (d - back);
  const vl bits = (vl)sum, even = (bits & 1) - 1, inexact = (vl)(error < 0.0) | (vl)(error > 0.0);
  const vl away = 1 + 2 * (vl)(error * sum < 0.0);  // -1 where the exact sum is nearer to zero
  return __builtin_convertvector((vd)(bits + (away & even & inexact)), vf);
}
#endif
PF_INLINE float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

PF_INLINE bool all(vm m) { return lanes(m) == lanes(eq(vi{}, vi{})); }

template <class V>
PF_INLINE V load_raw(const void* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}

// A hint only: an address past the end of an array does no harm.
PF_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }
PF_INLINE void prefetch_l2(const void* p) { __builtin_prefetch(p, 0, 2); }

PF_INLINE float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000u) << 16, magnitude = h & 0x7fffu;
  uint32_t u;
  if (magnitude >= 0x7c00u) {
    u = sign | kInfBits | (magnitude & 0x3ffu) << 13 | (magnitude > 0x7c00u ? 0x400000u : 0u);
  } else if (magnitude >= 0x400u) {
    u = sign | ((magnitude << 13) + 0x38000000u);
  } else {  // subnormal: exact in fp32
    float f = float(magnitude) * 5.9604644775390625e-08f;
    memcpy(&u, &f, 4);
    u |= sign;
  }
  float out;
  memcpy(&out, &u, 4);
  return out;
}

PF_INLINE uint16_t float_to_half(float f) {  // to nearest even; the NaN has been made canonical before
  uint32_t u;
  memcpy(&u, &f, 4);
  const uint32_t sign = u >> 16 & 0x8000u;
  u &= kAbsMask;
  if (u > kInfBits) return uint16_t(sign | 0x7e00u);
  if (u >= 0x477ff000u) return uint16_t(sign | 0x7c00u);
  if (u < 0x38800000u) {  // result is subnormal: let the adder round at 2^-24
    float a;
    memcpy(&a, &u, 4);
    a += 0.5f;
    uint32_t r;
    memcpy(&r, &a, 4);
    return uint16_t(sign | (r - 0x3f000000u));
  }
  return uint16_t(sign | ((u + 0xfffu + (u >> 13 & 1u) - 0x38000000u) >> 13));
}

PF_INLINE vu widen_16(vh h) {
#if defined(__AVX512F__)
  return (vu)_mm512_cvtepu16_epi32((__m256i)h);
#else
  return __builtin_convertvector(h, vu);
#endif
}

PF_INLINE vh narrow_32(vu u) {
#if defined(__AVX512F__)
  return (vh)_mm512_cvtepi32_epi16((__m512i)u);
#else
  return __builtin_convertvector(u, vh);
#endif
}

PF_INLINE vf load_bf16(const uint16_t* p) { return (vf)(widen_16(load_raw<vh>(p)) << 16); }

PF_INLINE vf load_f16(const uint16_t* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(load_raw<__m256i>(p));
#elif defined(__AVX2__)
  return (vf)_mm256_cvtph_ps(load_raw<__m128i>(p));
#else
  vf v;
  for (int i = 0; i < W; ++i) v[i] = half_to_float(load_raw<uint16_t>(p + i));
  return v;
#endif
}

// Element i of a run of `dtype`, widened to fp32. The branch is the same for a whole tensor.
PF_INLINE vf load(const void* p, int32_t dtype, int64_t i) {
  if (dtype == kBF16) return load_bf16((const uint16_t*)p + i);
  if (dtype == kF32) return load_raw<vf>((const float*)p + i);
  return load_f16((const uint16_t*)p + i);
}

PF_INLINE vf canonical(vf x) { return select(gt(abs_bits(x), splat_i(kInfBits)), (vf)splat_i(kNanBits), x); }

PF_INLINE vu round_to_bf16(vf canonical_x) {  // to nearest even, in the upper half; the NaN does not carry out
  const vu u = (vu)canonical_x;
#if defined(__AVX512F__)
  const __m512i up = _mm512_add_epi32((__m512i)u, _mm512_set1_epi32(0x7fff));
  return (vu)_mm512_mask_add_epi32(up, _mm512_test_epi32_mask((__m512i)u, _mm512_set1_epi32(0x10000)), up,
                                   _mm512_set1_epi32(1));
#else
  return u + 0x7fffu + (u >> 16 & 1u);
#endif
}

// 2 W elements at once as even and odd ones: a shift and a mask, where widening in order costs shuffles.
PF_INLINE void load_bf16_pair(const uint16_t* p, vf& even, vf& odd) {
  const vu both = load_raw<vu>(p);
  even = (vf)(both << 16);
  odd = (vf)(both & 0xffff0000u);
}

PF_INLINE vu bf16_pair(vf canonical_even, vf canonical_odd) {
  return (round_to_bf16(canonical_even) >> 16) | (round_to_bf16(canonical_odd) & 0xffff0000u);
}

// The same of two vectors that follow one another.
PF_INLINE vu bf16_in_order(vf first, vf second) {
#if defined(__AVX512F__)
  const vs iota = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15,
                   16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31};
  const __m512i upper_halves = (__m512i)(iota * 2 + 1);
  return (vu)_mm512_permutex2var_epi16((__m512i)round_to_bf16(first), upper_halves, (__m512i)round_to_bf16(second));
#else
  const vh halves[2] = {narrow_32(round_to_bf16(first) >> 16), narrow_32(round_to_bf16(second) >> 16)};
  return load_raw<vu>(halves);
#endif
}

PF_INLINE vh to_f16(vf canonical_x) {
#if defined(__AVX512F__)
  return (vh)_mm512_cvtps_ph((__m512)canonical_x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return (vh)_mm256_cvtps_ph((__m256)canonical_x, _MM_FROUND_TO_NEAREST_INT);
#else
  vh v;
  for (int i = 0; i < W; ++i) v[i] = float_to_half(canonical_x[i]);
  return v;
#endif
}

// Appends the set lanes of v to out, which has room for W more; returns how many.
PF_INLINE int compress(uint32_t* out, vi v, uint32_t set) {
#if defined(__AVX512F__)
  _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(__mmask16(set), (__m512i)v));
  return __builtin_popcount(set);
#else
  int n = 0;
  for (; set; set &= set - 1) out[n++] = uint32_t(v[__builtin_ctz(set)]);
  return n;
#endif
}
