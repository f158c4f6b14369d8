// Loads of task vectors for variant files: whole vectors, and blocks staged in scratch with a padded end.
#pragma once
#include "delta.h"
#include "low_rank/tile.h"
#include "simd.h"

namespace {

template <class T>
PF_INLINE const void* element(uint64_t p, int32_t dtype, T i) {
  return (const uint8_t*)p + int64_t(i) * itemsize(dtype);
}

PF_INLINE vf load_delta(const Delta& d, int64_t i) {
  const vf x = load((const void*)d.x, d.dtype, i);
  if (d.is_delta || d.base_kind == kBaseZero) return x;
  return x - (d.base_kind == kBaseOne ? splat(1.0f) : load((const void*)d.base, d.base_dtype, i));
}

PF_INLINE float load_one(uint64_t p, int32_t dtype, int64_t i) {
  if (dtype == kF32) return load_raw<float>((const float*)p + i);  // files may put tensors at any address
  const uint16_t h = load_raw<uint16_t>((const uint16_t*)p + i);
  if (dtype == kF16) return half_to_float(h);
  const uint32_t u = uint32_t(h) << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}

PF_INLINE float load_delta_one(const Delta& d, int64_t i) {
  const float x = load_one(d.x, d.dtype, i);
  if (d.is_delta || d.base_kind == kBaseZero) return x;
  return x - (d.base_kind == kBaseOne ? 1.0f : load_one(d.base, d.base_dtype, i));
}

static constexpr int kTile = 4096;  // elements of a low-rank product that are formed at once

// The same delta with elements [begin, begin + n), n <= kTile, in plain fp32: those of factors are formed in `tile`.
PF_INLINE Delta formed(const Delta& given, int64_t begin, int n, float* tile) {
  Delta d = given;
  if (d.dtype != kFactors) return d;
  form_tile(*(const Factors*)d.x, begin, n, tile);
  d.x = (uint64_t)tile - uint64_t(begin) * sizeof(float);
  d.dtype = kF32;
  return d;
}

// out[0..n) = the task vector from element `begin`, n <= kTile; room for n rounded up to W, the rest zero.
PF_INLINE void stage_delta(const Delta& given, int64_t begin, int n, float* out) {
  alignas(64) float tile[kTile];
  const Delta d = formed(given, begin, n, tile);
  int i = 0;
  for (; i + W <= n; i += W) {
    const vf v = load_delta(d, begin + i);
    memcpy(out + i, &v, sizeof v);
  }
  for (; i < n; ++i) out[i] = load_delta_one(d, begin + i);
  for (; i % W; ++i) out[i] = 0.0f;
}

}  // namespace

#define PETA_JOIN2(a, b) a##b
#define PETA_JOIN(a, b) PETA_JOIN2(a, b)
