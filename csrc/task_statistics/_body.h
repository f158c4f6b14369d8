// The loop, once. A variant file defines PETA_VARIANT and includes this.
#include "task_statistics.h"

#include "../delta_load.h"
#include "../lanes.h"

namespace {

// Elements of [0, n), n a multiple of 32, for whose vector at k the test gives a set lane.
template <class Test>
PF_INLINE uint32_t count_where(int n, Test test) {
  uint32_t count = 0;
  for (int k = 0; k < n; k += W) count += __builtin_popcount(lanes(test(k)));
  return count;
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
    vi largest = vi{};
    counts.nonfinite[t] += count_where(padded, [&](int k) {
      const vi a = abs_bits(load_raw<vf>(d + k));
      const vm is_nan = gt(a, splat_i(kInfBits));
      largest = max_i(largest, select(is_nan, vi{}, a));
      return gt(a, splat_i(kInfBits - 1));
    });
    counts.nonzero[t] += count_where(padded, [&](int k) { return gt(abs_bits(load_raw<vf>(d + k)), vi{}); });
    for (int i = 0; i < W; ++i)
      if (uint32_t(largest[i]) > counts.largest[t]) counts.largest[t] = uint32_t(largest[i]);
    sums[t] = sum_in_lanes(padded, [=](int k) { return wide(d + k); });
    sums[tasks + t] = sum_in_lanes(padded, [=](int k) { return magnitude(wide(d + k)); });
  }
  double* gram = sums + 2 * tasks;
  int64_t pair = 0;
  for (int s = 0; s < tasks; ++s) {
    const float* a = scratch + int64_t(s) * kRow;
    for (int t = s; t < tasks; ++t) {
      const float* b = scratch + int64_t(t) * kRow;
      *gram++ = sum_in_lanes(padded, [=](int k) { return wide(a + k) * wide(b + k); });
      if (t == s) continue;
      counts.conflicts[pair++] += count_where(padded, [=](int k) {
        const vf x = load_raw<vf>(a + k), y = load_raw<vf>(b + k), zero = vf{};
        return either(both(gt(x, zero), gt(zero, y)), both(gt(zero, x), gt(y, zero)));
      });
    }
  }
  *counts.any_conflict += count_where(padded, [=](int k) {
    vm up = none(), down = none();
    for (int t = 0; t < tasks; ++t) {
      const vf d = load_raw<vf>(scratch + int64_t(t) * kRow + k);
      up = either(up, gt(d, vf{})), down = either(down, gt(vf{}, d));
    }
    return both(up, down);
  });
}
