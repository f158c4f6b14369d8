// The loop, once. A variant file defines PETA_VARIANT and includes this.
#include "task_statistics.h"

#include "../delta_load.h"

namespace {

PF_INLINE double tree_of_lanes(double* lane) {
  for (int half = 16; half; half /= 2)
    for (int j = 0; j < half; ++j) lane[j] = lane[j] + lane[j + half];
  return lane[0];
}

// Sum over k of term(k), k < n, n a multiple of 32.
template <class Term>
PF_INLINE double sum_in_lanes(int n, Term term) {
  double lane[32] = {};
  for (int k = 0; k < n; k += 32)
    for (int j = 0; j < 32; ++j) lane[j] += term(k + j);
  return tree_of_lanes(lane);
}

}  // namespace

extern "C" void PETA_JOIN(peta_task_statistics_, PETA_VARIANT)(const Delta* deltas, int tasks, int64_t begin, int n,
                                                               double* sums, const StatisticsCounts& counts,
                                                               float* scratch) {
  constexpr int kRow = kStatisticsBlock + 16;
  const int padded = (n + 31) / 32 * 32;
  for (int t = 0; t < tasks; ++t) {
    float* d = scratch + int64_t(t) * kRow;
    stage_delta(deltas[t], begin, n, d);
    for (int i = n; i < padded; ++i) d[i] = 0.0f;
    const uint32_t* u = (const uint32_t*)d;
    uint32_t nonfinite = 0, nonzero = 0, largest = 0;
    for (int i = 0; i < padded; ++i) {
      const uint32_t a = u[i] & kAbsMask;
      nonfinite += a >= kInfBits;
      nonzero += a != 0;
      largest = a <= kInfBits && a > largest ? a : largest;
    }
    counts.nonfinite[t] += nonfinite;
    counts.nonzero[t] += nonzero;
    counts.largest[t] = largest > counts.largest[t] ? largest : counts.largest[t];
    sums[t] = sum_in_lanes(padded, [=](int k) { return double(d[k]); });
    sums[tasks + t] = sum_in_lanes(padded, [=](int k) { return double(__builtin_fabsf(d[k])); });
  }
  double* gram = sums + 2 * tasks;
  int64_t pair = 0;
  for (int s = 0; s < tasks; ++s) {
    const float* a = scratch + int64_t(s) * kRow;
    for (int t = s; t < tasks; ++t) {
      const float* b = scratch + int64_t(t) * kRow;
      *gram++ = sum_in_lanes(padded, [=](int k) { return double(a[k]) * double(b[k]); });
      if (t == s) continue;
      uint32_t opposite = 0;
      for (int i = 0; i < padded; ++i) opposite += ((a[i] > 0.0f) & (b[i] < 0.0f)) | ((a[i] < 0.0f) & (b[i] > 0.0f));
      counts.conflicts[pair++] += opposite;
    }
  }
  uint32_t any = 0;
  for (int k = 0; k < padded; k += W) {
    vm up = none(), down = none();
    for (int t = 0; t < tasks; ++t) {
      const vf d = load_raw<vf>(scratch + int64_t(t) * kRow + k);
      up = either(up, gt(d, vf{})), down = either(down, gt(vf{}, d));
    }
    any += __builtin_popcount(lanes(both(up, down)));
  }
  *counts.any_conflict += any;
}
