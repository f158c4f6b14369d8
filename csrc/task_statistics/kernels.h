// Sums over task vectors on a device, in the CPU's order: fp64, blocks of 4096 elements, 32 interleaved lanes, halves
// onto halves, then pairs of blocks. A warp takes one sum of one block; its threads are the lanes.
//
// Floor: base and T models read once; here once for every sum, out of the caches.
#pragma once
#include "../device/load.h"
#include "task_statistics.h"

namespace peta {

static constexpr int kSumWarps = 8;

struct BlockSums {
  static constexpr int kThreads = 32 * kSumWarps, kBlocks = 4, kPhases = 2;
  struct Shared {
    double lanes[kSumWarps][32];
  };
  const Delta* deltas;
  double* partials;  // [blocks, width]
  int64_t size;
  int32_t tasks, width, groups;

  template <int kPhase>
  PF_HD void phase(Shared& s, const Block& block) const {
    const int warp = block.thread / 32, lane = block.thread % 32;
    const int64_t which = block.index / groups;
    const int sum = int(block.index % groups) * kSumWarps + warp;
    if (sum >= width) return;
    if constexpr (kPhase == 0) {
      const int64_t begin = which * kStatisticsBlock, end = smaller(begin + kStatisticsBlock, size);
      s.lanes[warp][lane] = sum < 2 * tasks ? of_one(sum, begin + lane, end) : of_two(sum - 2 * tasks, begin + lane, end);
    } else if (lane == 0) {
      double* const v = s.lanes[warp];
      PF_NO_UNROLL
      for (int half = 16; half; half /= 2)
        for (int j = 0; j < half; ++j) v[j] = v[j] + v[j + half];
      partials[which * width + sum] = v[0];
    }
  }

  PF_HD double of_one(int sum, int64_t i, int64_t end) const {
    const Delta delta = deltas[sum % tasks];
    double total = 0.0;
    for (; i < end; i += 32) {
      const float d = delta_element(delta, i);
      total = total + double(sum < tasks ? d : fabsf(d));
    }
    return total;
  }

  PF_HD double of_two(int pair, int64_t i, int64_t end) const {
    int a = 0;
    for (; pair >= tasks - a; ++a) pair -= tasks - a;
    const Delta one = deltas[a], other = deltas[a + pair];
    double total = 0.0;
    for (; i < end; i += 32) total = total + double(delta_element(one, i)) * double(delta_element(other, i));
    return total;
  }
};

// One level of the tree over kTreeWidth neighbours and one sum: adjacent pairs, the odd one out as it is.
static constexpr int kTreeWidth = 2048, kTreeLevels = 11;

struct TreeStep {
  static constexpr int kThreads = 256, kBlocks = 4, kPhases = kTreeLevels + 2;
  struct Shared {
    double even[kTreeWidth], odd[kTreeWidth / 2];
  };
  const double* from;  // [count, width]
  double* to;          // [ceil(count / kTreeWidth), width]
  int64_t count;
  int32_t width;

  template <int kPhase>
  PF_HD void phase(Shared& s, const Block& block) const {
    const int64_t chunk = block.index / width;
    const int sum = int(block.index % width);
    const int64_t first = chunk * kTreeWidth;
    int n = int(smaller(kTreeWidth, count - first));
    if constexpr (kPhase == 0) {
      for (int i = block.thread; i < n; i += kThreads) s.even[i] = from[(first + i) * width + sum];
    } else if constexpr (kPhase <= kTreeLevels) {
      n = (n + (1 << (kPhase - 1)) - 1) >> (kPhase - 1);
      const double* const v = kPhase % 2 ? s.even : s.odd;
      double* const pairs = kPhase % 2 ? s.odd : s.even;
      for (int i = block.thread; 2 * i < n; i += kThreads) pairs[i] = 2 * i + 1 < n ? v[2 * i] + v[2 * i + 1] : v[2 * i];
    } else if (block.thread == 0) {
      to[chunk * width + sum] = (kTreeLevels % 2 ? s.odd : s.even)[0];
    }
  }
};

// Counts: tasks first (not finite, not zero, the largest), then pairs of opposite sign, then any pair at all.
static constexpr int64_t kCountTile = 65536;

struct CountSigns {
  static constexpr int kThreads = 32 * kSumWarps, kBlocks = 4, kPhases = 3;
  struct Shared {
    uint32_t nonfinite[kSumWarps], count[kSumWarps], largest[kSumWarps];
  };
  const Delta* deltas;
  int64_t* counts;  // nonfinite [T], nonzero [T], conflicts [T (T - 1) / 2], any [1]
  uint32_t* largest;
  int64_t size;
  int32_t tasks, kinds, groups;

  template <int kPhase>
  PF_HD void phase(Shared& s, const Block& block) const {
    const int warp = block.thread / 32, lane = block.thread % 32;
    const int kind = int(block.index % groups) * kSumWarps + warp;
    const int64_t begin = block.index / groups * kCountTile + lane;
    if (kind >= kinds) return;
    if constexpr (kPhase == 0) {
      if (lane == 0) s.nonfinite[warp] = s.count[warp] = s.largest[warp] = 0;
    } else if constexpr (kPhase == 1) {
      const int64_t end = smaller(begin - lane + kCountTile, size);
      uint32_t bad = 0, count = 0, most = 0;
      if (kind < tasks) of_one(kind, begin, end, &bad, &count, &most);
      else if (kind < kinds - 1) count = opposite(kind - tasks, begin, end);
      else count = any(begin, end);
      add_all(&s.nonfinite[warp], bad), add_all(&s.count[warp], count), max_all(&s.largest[warp], most);
    } else if (lane == 0) {
      if (s.nonfinite[warp]) atomic_add(counts + kind, int64_t(s.nonfinite[warp]));
      if (s.count[warp]) atomic_add(counts + tasks + kind, int64_t(s.count[warp]));
      if (s.largest[warp]) atomic_max(largest + kind, s.largest[warp]);
    }
  }

  PF_HD void of_one(int task, int64_t i, int64_t end, uint32_t* bad, uint32_t* count, uint32_t* most) const {
    const Delta delta = deltas[task];
    for (; i < end; i += 32) {
      const uint32_t a = bits_of(delta_element(delta, i)) & kAbsMask;
      *bad += a >= kInfBits, *count += a != 0;
      if (a <= kInfBits && a > *most) *most = a;
    }
  }

  PF_HD uint32_t opposite(int pair, int64_t i, int64_t end) const {
    int a = 0;
    for (; pair >= tasks - 1 - a; ++a) pair -= tasks - 1 - a;
    const Delta one = deltas[a], other = deltas[a + 1 + pair];
    uint32_t count = 0;
    for (; i < end; i += 32) {
      const float x = delta_element(one, i), y = delta_element(other, i);
      count += (x > 0.0f && y < 0.0f) || (x < 0.0f && y > 0.0f);
    }
    return count;
  }

  PF_HD uint32_t any(int64_t i, int64_t end) const {
    uint32_t count = 0;
    for (; i < end; i += 32) {
      bool up = false, down = false;
      for (int t = 0; t < tasks; ++t) {
        const float d = delta_element(deltas[t], i);
        up = up || d > 0.0f, down = down || d < 0.0f;
      }
      count += up && down;
    }
    return count;
  }
};

// Bytes that are not zero, or bits that are set, of the first `size` of a mask.
struct CountMask {
  static constexpr int kThreads = 256, kBlocks = 4, kPhases = 3;
  struct Shared {
    uint32_t count;
  };
  const uint8_t* mask;
  int64_t* count;
  int64_t size;
  int32_t bits;

  template <int kPhase>
  PF_HD void phase(Shared& s, const Block& block) const {
    if constexpr (kPhase == 0) {
      if (block.thread == 0) s.count = 0;
    } else if constexpr (kPhase == 1) {
      const int64_t begin = block.index * kCountTile, end = smaller(begin + kCountTile, size);
      uint32_t n = 0;
      for (int64_t i = begin + block.thread; i < end; i += kThreads)
        n += bits ? uint32_t(mask[i >> 3]) >> (i & 7) & 1u : uint32_t(mask[i] != 0);
      add_all(&s.count, n);
    } else if (block.thread == 0 && s.count) {
      atomic_add(count, int64_t(s.count));
    }
  }
};

}  // namespace peta
