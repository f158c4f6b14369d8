// Sums in fp64 over a block in 32 interleaved lanes, for variant files: one order, whatever the instruction set.
#pragma once
#include "simd.h"

namespace {

typedef double vd __attribute__((vector_size(W * 4)));
static constexpr int D = W / 2;

PF_INLINE vd wide(const float* p) {
#if defined(__AVX512F__)
  return (vd)_mm512_cvtps_pd(_mm256_loadu_ps(p));
#elif defined(__AVX2__)
  return (vd)_mm256_cvtps_pd(_mm_loadu_ps(p));
#else
  return vd{double(p[0]), double(p[1])};
#endif
}
PF_INLINE vd magnitude(vd x) {
  typedef int64_t vl __attribute__((vector_size(W * 4)));
  return (vd)((vl)x & INT64_MAX);
}

// The sum of term(k), ..., term(k + D - 1) over k < n, n a multiple of 32: 32 interleaved lanes, then halves onto halves.
template <class Term>
PF_INLINE double sum_in_lanes(int n, Term term) {
  constexpr int kVectors = 32 / D < 8 ? 32 / D : 8;  // at once: as many as there are registers for
  double lane[32];
  for (int first = 0; first < 32; first += kVectors * D) {
    vd sums[kVectors] = {};
    for (int k = first; k < n; k += 32)
      for (int j = 0; j < kVectors; ++j) sums[j] += term(k + j * D);
    memcpy(lane + first, sums, sizeof sums);
  }
  for (int half = 16; half; half /= 2)
    for (int j = 0; j < half; ++j) lane[j] = lane[j] + lane[j + half];
  return lane[0];
}

}  // namespace
