// The one streaming pass of a selection: for every element and bracket four comparisons; what lies strictly inside goes
// to memory by way of the block's shared memory.
#pragma once
#include "kernels.h"

namespace peta {

struct Counts {
  uint32_t gt_high = 0, ge_high = 0, gt_low = 0, ge_low = 0;
};

// What a block keeps of each of its queries.
struct StreamShared {
  uint64_t base[kSlots], x[kSlots];
  Delta delta[kSlots];
  uint32_t low[kSlots], high[kSlots];
  int64_t size;
  uint32_t counts[kSlots][4];
  uint32_t kept[kSlots];
  int64_t place[kSlots];
  uint32_t values[kSlots][kStaged];
};

PF_HD void keep_candidate(StreamShared& s, Wanted* wanted, const Unit& unit, int slot, uint32_t a) {
  const uint32_t place = atomic_add(&s.kept[slot], 1u);
  if (place < uint32_t(kStaged)) {
    s.values[slot][place] = a;
    return;
  }
  Wanted& w = wanted[unit.slots[slot]];
  const int64_t where = atomic_add(&w.inside, int64_t(1));
  if (where < w.capacity) reinterpret_cast<uint32_t*>(w.candidates)[where] = a;
}

PF_HD void count_by_bits(StreamShared& s, Wanted* wanted, const Unit& unit, int slot, uint32_t a, Counts& n) {
  const uint32_t low = s.low[slot], high = s.high[slot];
  n.gt_high += a > high, n.ge_high += a >= high, n.gt_low += a > low, n.ge_low += a >= low;
  if (a > low && a < high) keep_candidate(s, wanted, unit, slot, a);
}

// sum * 1 + d * 0: NaN once any d is not finite.
PF_HD float sticky(float sum, float d) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(d, 0.0f, sum);
#else
  return sum + d * 0.0f;
#endif
}

// kDtype: of base and models, where all are of one and differences from a base; else -1.
template <int32_t kDtype>
struct CountTile {
  static constexpr int kThreads = kSelectThreads, kBlocks = 4, kPhases = 4;
  static constexpr int V = kDtype < 0 ? 4 : kDtype == kF32 ? 4 : 8;
  typedef StreamShared Shared;
  SelectTables tables;

  template <int kPhase>
  PF_HD void phase(Shared& s, const Block& block) const {
    const Unit& unit = tables.units[block.index];
    if constexpr (kPhase == 0) {
      open(s, unit, block.thread);
    } else if constexpr (kPhase == 1) {
      count(s, unit, block.thread);
    } else if constexpr (kPhase == 2) {
      add_counts(s, unit, block.thread);
    } else {
      for (int k = 0; k < kSlots; ++k) {
        if (unit.slots[k] < 0) continue;
        const Wanted& w = tables.wanted[unit.slots[k]];
        uint32_t* const to = reinterpret_cast<uint32_t*>(w.candidates);
        const int64_t room = smaller(smaller(s.kept[k], kStaged), w.capacity - s.place[k]);
        for (int64_t i = block.thread; i < room; i += kThreads) to[s.place[k] + i] = s.values[k][i];
      }
    }
  }

  PF_HD void open(Shared& s, const Unit& unit, int thread) const {
    if (thread >= kSlots) return;
    const int k = thread;
    s.kept[k] = 0, s.place[k] = 0;
    for (int i = 0; i < 4; ++i) s.counts[k][i] = 0;
    if (unit.slots[k] < 0) return;
    const Wanted& w = tables.wanted[unit.slots[k]];
    const SelectTask& task = tables.tasks[w.task];
    s.delta[k] = task.delta, s.base[k] = task.delta.base, s.x[k] = task.delta.x;
    s.low[k] = w.low, s.high[k] = w.high;
    if (k == 0) s.size = task.size;
  }

  PF_HD void add_counts(Shared& s, const Unit& unit, int thread) const {
    if (thread >= kSlots || unit.slots[thread] < 0) return;
    Wanted& w = tables.wanted[unit.slots[thread]];
    const uint32_t(&n)[4] = s.counts[thread];
    if (n[0]) atomic_add(&w.gt_high, int64_t(n[0]));
    if (n[1]) atomic_add(&w.ge_high, int64_t(n[1]));
    if (n[2]) atomic_add(&w.gt_low, int64_t(n[2]));
    if (n[3]) atomic_add(&w.ge_low, int64_t(n[3]));
    const int64_t kept = smaller(s.kept[thread], kStaged);
    if (kept) s.place[thread] = atomic_add(&w.inside, kept);
  }

  PF_HD void count(Shared& s, const Unit& unit, int thread) const {
    const int64_t begin = unit.index * kSelectTile, end = smaller(begin + kSelectTile, s.size);
    Counts n[kSlots];
    for (int64_t i = begin + int64_t(thread) * V; i < end; i += kThreads * V) {
      if constexpr (kDtype >= 0) {
        if (i + V <= end) {
          count_16_bytes(s, unit, i, n);
          continue;
        }
      }
      PF_UNROLL
      for (int k = 0; k < kSlots; ++k)
        if (unit.slots[k] >= 0)
          for (int64_t j = i; j < smaller(i + V, end); ++j)
            count_by_bits(s, tables.wanted, unit, k, magnitude_bits(s.delta[k], j), n[k]);
    }
    PF_UNROLL
    for (int k = 0; k < kSlots; ++k) {
      add_all(&s.counts[k][0], n[k].gt_high), add_all(&s.counts[k][1], n[k].ge_high);
      add_all(&s.counts[k][2], n[k].gt_low), add_all(&s.counts[k][3], n[k].ge_low);
    }
  }

  PF_HD void count_16_bytes(Shared& s, const Unit& unit, int64_t i, Counts (&n)[kSlots]) const {
    typedef Packed<kDtype < 0 ? kF32 : kDtype> Words;
    constexpr int H = Words::kPerWord;
    const int64_t bytes = i * itemsize(kDtype);
    Words base, x[kSlots];
    base.load(at(s.base[0], bytes), aligned(at(s.base[0], bytes), 16));
    PF_UNROLL
    for (int k = 0; k < kSlots; ++k)
      if (unit.slots[k] >= 0) x[k].load(at(s.x[k], bytes), aligned(at(s.x[k], bytes), 16));
    PF_UNROLL
    for (int k = 0; k < kSlots; ++k) {
      if (unit.slots[k] < 0) continue;
      float d[V], infinite = 0.0f;
      PF_UNROLL
      for (int j = 0; j < V; ++j) {
        d[j] = fabsf(x[k].get(j / H, j % H) - base.get(j / H, j % H));
        infinite = sticky(infinite, d[j]);
      }
      if (!(infinite == 0.0f)) {
        for (int j = 0; j < V; ++j) count_by_bits(s, tables.wanted, unit, k, magnitude_bits(s.delta[k], i + j), n[k]);
        continue;
      }
      const float low = float_of(s.low[k] < kInfBits ? s.low[k] : kInfBits);
      const float high = float_of(s.high[k] < kInfBits ? s.high[k] : kInfBits);
      PF_UNROLL
      for (int j = 0; j < V; ++j) {
        const bool above_low = d[j] > low, from_high = d[j] >= high;
        n[k].gt_high += d[j] > high, n[k].ge_high += from_high;
        n[k].gt_low += above_low, n[k].ge_low += d[j] >= low;
        if (above_low && !from_high) keep_candidate(s, tables.wanted, unit, k, bits_of(d[j]));
      }
    }
  }
};

}  // namespace peta
