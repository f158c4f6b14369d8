// Loads, stores and their roundings for the CUDA kernels: 16 bytes at once where the address allows it, any address else.
#pragma once
#include "../delta.h"
#include "../dtype.h"
#include "device.h"

namespace peta {

struct alignas(16) Words4 {
  uint32_t w[4];
};

PF_HD const uint8_t* at(uint64_t p, int64_t bytes) { return reinterpret_cast<const uint8_t*>(p) + bytes; }
PF_HD bool aligned(const void* p, uint64_t to) { return (reinterpret_cast<uint64_t>(p) & (to - 1)) == 0; }

// Of global memory, as the addresses within tables do not say. The compiler keeps their order.
#if defined(__CUDA_ARCH__)
__device__ __forceinline__ Words4 load_global_16(const void* p) {
  Words4 v;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3]) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ void store_global_16(void* p, const Words4& v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
               :: "l"(p), "r"(v.w[0]), "r"(v.w[1]), "r"(v.w[2]), "r"(v.w[3]) : "memory");
}
__device__ __forceinline__ void load_global(const void* p, uint32_t& v) {
  asm volatile("ld.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
}
__device__ __forceinline__ void load_global(const void* p, uint16_t& v) {
  asm volatile("ld.global.u16 %0, [%1];" : "=h"(v) : "l"(p) : "memory");
}
__device__ __forceinline__ void store_global(void* p, uint32_t v) {
  asm volatile("st.global.u32 [%0], %1;" :: "l"(p), "r"(v) : "memory");
}
__device__ __forceinline__ void store_global(void* p, uint16_t v) {
  asm volatile("st.global.u16 [%0], %1;" :: "l"(p), "h"(v) : "memory");
}
#endif

PF_HD Words4 load_16(const void* p) {
#if defined(__CUDA_ARCH__)
  return load_global_16(p);
#else
  Words4 v;
  memcpy(&v, p, 16);
  return v;
#endif
}

PF_HD void store_16(void* p, const Words4& v) {
#if defined(__CUDA_ARCH__)
  store_global_16(p, v);
#else
  memcpy(p, &v, 16);
#endif
}

// 2 or 4 bytes at any address.
template <class T>
PF_HD T load_small(const void* p) {
  T v;
#if defined(__CUDA_ARCH__)
  if (aligned(p, sizeof(T))) {
    load_global(p, v);
  } else {
    const volatile uint8_t* const b = static_cast<const volatile uint8_t*>(p);
    v = 0;
    PF_NO_UNROLL
    for (int i = int(sizeof(T)) - 1; i >= 0; --i) v = T(uint32_t(v) << 8 | b[i]);
  }
#else
  memcpy(&v, p, sizeof v);
#endif
  return v;
}

template <class T>
PF_HD void store_small(void* p, T v) {
#if defined(__CUDA_ARCH__)
  if (aligned(p, sizeof(T))) {
    store_global(p, v);
  } else {
    volatile uint8_t* const b = static_cast<volatile uint8_t*>(p);
    PF_NO_UNROLL
    for (unsigned i = 0; i < sizeof(T); ++i) b[i] = uint8_t(v >> (8 * i));
  }
#else
  memcpy(p, &v, sizeof v);
#endif
}

// ---------------------------------------------------------------- one element

PF_HD float half_bits_to_float(uint16_t h) {  // NaN keeps its payload and turns quiet
  const uint32_t sign = uint32_t(h & 0x8000u) << 16, magnitude = h & 0x7fffu;
  if (magnitude >= 0x7c00u)
    return float_of(sign | kInfBits | (magnitude & 0x3ffu) << 13 | (magnitude > 0x7c00u ? 0x400000u : 0u));
  if (magnitude >= 0x400u) return float_of(sign | ((magnitude << 13) + 0x38000000u));
  return float_of(bits_of(float(magnitude) * 5.9604644775390625e-08f) | sign);  // subnormal: exact in fp32
}

// Where h is no NaN; of a NaN, some NaN.
PF_HD float widen_f16(uint16_t h) {
#if defined(__CUDA_ARCH__)
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return f;
#else
  return half_bits_to_float(h);
#endif
}

PF_HD float load_element(const void* p, int32_t dtype) {
  if (dtype == kF32) return float_of(load_small<uint32_t>(p));
  const uint16_t h = load_small<uint16_t>(p);
  return dtype == kBF16 ? float_of(uint32_t(h) << 16) : half_bits_to_float(h);
}

// x - b as x86 has it: a NaN operand passes with its payload, x's first; inf - inf is the negative quiet NaN. Order
// statistics rank NaN by their bits, so the bits must not depend on who computes them.
PF_HD float subtract(float x, float b) {
  const float d = x - b;
  if (d == d) return d;
  if (x != x) return float_of(bits_of(x) | 0x400000u);
  if (b != b) return float_of(bits_of(b) | 0x400000u);
  return float_of(0xffc00000u);
}

PF_HD float base_element(uint64_t base, int32_t kind, int32_t dtype, int64_t i) {
  if (kind == kBaseTensor) return load_element(at(base, i * itemsize(dtype)), dtype);
  return kind == kBaseOne ? 1.0f : 0.0f;
}

PF_HD float delta_element(const Delta& d, int64_t i) {
  const float x = load_element(at(d.x, i * itemsize(d.dtype)), d.dtype);
  if (d.is_delta || d.base_kind == kBaseZero) return x;
  return subtract(x, base_element(d.base, d.base_kind, d.base_dtype, i));
}

PF_HD uint16_t round_to_half(float f) {  // to nearest even; f is no NaN
#if defined(__CUDA_ARCH__)
  uint16_t h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
#else
  uint32_t u = bits_of(f);
  const uint32_t sign = u >> 16 & 0x8000u;
  u &= kAbsMask;
  if (u >= 0x477ff000u) return uint16_t(sign | 0x7c00u);
  if (u < 0x38800000u) return uint16_t(sign | (bits_of(float_of(u) + 0.5f) - 0x3f000000u));
  return uint16_t(sign | ((u + 0xfffu + (u >> 13 & 1u) - 0x38000000u) >> 13));
#endif
}

PF_HD uint16_t round_to_bf16(float f) {  // to nearest even; f is no NaN
  const uint32_t u = bits_of(f);
  return uint16_t((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
}

// Rounds and stores, NaN in its one pattern; returns the bits of |y|.
PF_HD uint32_t store_element(void* p, int32_t dtype, float y) {
  const bool is_nan = y != y;
  if (dtype == kF32) store_small<uint32_t>(p, is_nan ? kNanBits : bits_of(y));
  else if (dtype == kBF16) store_small<uint16_t>(p, is_nan ? uint16_t(kNanBits >> 16) : round_to_bf16(y));
  else store_small<uint16_t>(p, is_nan ? uint16_t(0x7e00) : round_to_half(y));
  return is_nan ? kNanBits : bits_of(y) & kAbsMask;
}

// Bits of the smallest |y| that rounds to infinity.
PF_HD uint32_t first_overflow(int32_t dtype) {
  return dtype == kBF16 ? 0x7f7f8000u : dtype == kF16 ? 0x477ff000u : 0x7f800000u;
}

// sum + d * 0: NaN once any d is not finite.
PF_HD float sticky(float sum, float d) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(d, 0.0f, sum);
#else
  return sum + d * 0.0f;
#endif
}

// What stands before is worked off before what stands behind: elements side by side would take too many registers.
PF_HD void one_after_another() {
#if defined(__CUDA_ARCH__)
  asm volatile("" ::: "memory");
#endif
}

// a / b, as IEEE has it, given inverse = 1 / b rounded to nearest: Markstein's step, whose remainder is exact. For finite
// a and b whose magnitudes, quotient and remainder are far from the ends of the range; a may be 0.
PF_HD float divide_by(float a, float b, float inverse) {
  const float q = a * inverse;
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(__fmaf_rn(-b, q, a), inverse, q);
#else
  return fmaf(fmaf(-b, q, a), inverse, q);
#endif
}

// ---------------------------------------------------------------- 16 bytes of one dtype

template <int32_t kDtype>
struct Packed {
  static constexpr int kElements = kDtype == kF32 ? 4 : 8;
  static constexpr int kPerWord = kDtype == kF32 ? 1 : 2;
  Words4 words;

  PF_HD void load(const void* p) { words = load_16(p); }  // a multiple of 16
  PF_HD void store(void* p) const { store_16(p, words); }

  PF_HD float get(int k, int half) const {  // of word k; NaN of fp16 lose their payload
    const uint32_t w = words.w[k];
    if (kDtype == kF32) return float_of(w);
    if (kDtype == kBF16) return float_of(half ? w & 0xffff0000u : w << 16);
    return widen_f16(uint16_t(half ? w >> 16 : w));
  }

  // Word k from finite values.
  PF_HD void set(int k, const float (&y)[kPerWord]) {
    if constexpr (kDtype == kF32) {
      words.w[k] = bits_of(y[0]);
    } else {
#if defined(__CUDA_ARCH__)
      if constexpr (kDtype == kBF16)
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(words.w[k]) : "f"(y[1]), "f"(y[0]));
      else
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(words.w[k]) : "f"(y[1]), "f"(y[0]));
#else
      if constexpr (kDtype == kBF16) words.w[k] = round_to_bf16(y[0]) | uint32_t(round_to_bf16(y[1])) << 16;
      else words.w[k] = round_to_half(y[0]) | uint32_t(round_to_half(y[1])) << 16;
#endif
    }
  }
};

}  // namespace peta
