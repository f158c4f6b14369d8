// The one streaming pass of a selection: for every element and bracket five comparisons; what lies strictly inside goes
// to memory by way of the block's shared memory.
#pragma once
#include "kernels.h"

namespace peta {

struct Counts {
  uint32_t gt_high = 0, ge_high = 0, ge_low = 0;
};

// n += x > bound, n += x >= bound: one comparison and one addition under its predicate.
PF_HD void count_above(uint32_t& n, float x, float bound) {
#if defined(__CUDA_ARCH__)
  asm("{ .reg .pred p; setp.gt.f32 p, %1, %2; @p add.u32 %0, %0, 1; }" : "+r"(n) : "f"(x), "f"(bound));
#else
  n += x > bound;
#endif
}
PF_HD void count_from(uint32_t& n, float x, float bound) {
#if defined(__CUDA_ARCH__)
  asm("{ .reg .pred p; setp.ge.f32 p, %1, %2; @p add.u32 %0, %0, 1; }" : "+r"(n) : "f"(x), "f"(bound));
#else
  n += x >= bound;
#endif
}

// What a block keeps of each of its queries.
struct StreamShared {
  uint64_t base[kSlots], x[kSlots];
  Delta delta[kSlots];
  uint32_t low[kSlots], high[kSlots];
  int64_t size;
  uint32_t counts[kSlots][3];
  uint32_t kept[kSlots];
  uint32_t again[kSlots];  // as many as there was no room for have been found again
  int32_t slots;
  uint32_t one_by_one;  // an address allows no 16 bytes at once
  int64_t place[kSlots];
  uint32_t values[kSlots][kStaged];
};

PF_HD void keep_candidate(StreamShared& s, int slot, uint32_t a) {
  const uint32_t place = atomic_add(&s.kept[slot], 1u);
  if (place < uint32_t(kStaged)) s.values[slot][place] = a;
}

PF_HD void count_by_bits(StreamShared& s, int slot, uint32_t a, Counts& n) {
  const uint32_t low = s.low[slot], high = s.high[slot];
  n.gt_high += a > high, n.ge_high += a >= high, n.ge_low += a >= low;
  if (a > low && a < high) keep_candidate(s, slot, a);
}

// kDtype: of base and models, where all are of one and differences from a base; else -1.
template <int32_t kDtype>
struct CountTile {
  static constexpr int kThreads = kSelectThreads, kBlocks = 4, kPhases = 4;
  static constexpr int V = kDtype < 0 || kDtype == kF32 ? 4 : 8;
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
      for (int k = 0; k < s.slots; ++k) put_candidates(s, unit, k, block.thread);
    }
  }

  PF_HD void put_candidates(Shared& s, const Unit& unit, int k, int thread) const {
    const Wanted& w = tables.wanted[unit.slots[k]];
    uint32_t* const to = reinterpret_cast<uint32_t*>(w.candidates) + s.place[k];
    const int64_t room = smaller(s.kept[k], w.capacity - s.place[k]);
    if (s.kept[k] <= uint32_t(kStaged)) {
      for (int64_t i = thread; i < room; i += kThreads) to[i] = s.values[k][i];
      return;
    }
    const int64_t begin = unit.index * kSelectTile, end = smaller(begin + kSelectTile, s.size);
    for (int64_t i = begin + thread; i < end; i += kThreads) {
      const uint32_t a = magnitude_bits(s.delta[k], i);
      if (a <= s.low[k] || a >= s.high[k]) continue;
      const int64_t place = atomic_add(&s.again[k], 1u);
      if (place < room) to[place] = a;
    }
  }

  PF_HD void open(Shared& s, const Unit& unit, int thread) const {
    if (thread == 0) {
      s.one_by_one = kDtype < 0, s.slots = 0;
      for (int k = 0; k < kSlots && unit.slots[k] >= 0; ++k) {
        ++s.slots;
        const Delta& d = tables.tasks[tables.wanted[unit.slots[k]].task].delta;
        if (((d.base | d.x) & 15) != 0) s.one_by_one = 1;
      }
    }
    if (thread >= kSlots) return;
    const int k = thread;
    s.kept[k] = 0, s.place[k] = 0, s.again[k] = 0;
    for (int i = 0; i < 3; ++i) s.counts[k][i] = 0;
    if (unit.slots[k] < 0) return;
    const Wanted& w = tables.wanted[unit.slots[k]];
    const SelectTask& task = tables.tasks[w.task];
    s.delta[k] = task.delta, s.base[k] = task.delta.base, s.x[k] = task.delta.x;
    s.low[k] = w.low, s.high[k] = w.high;
    if (k == 0) s.size = task.size;
  }

  PF_HD void add_counts(Shared& s, const Unit& unit, int thread) const {
    if (thread >= s.slots) return;
    Wanted& w = tables.wanted[unit.slots[thread]];
    const uint32_t(&n)[3] = s.counts[thread];
    if (n[0]) atomic_add(&w.gt_high, int64_t(n[0]));
    if (n[1]) atomic_add(&w.ge_high, int64_t(n[1]));
    if (n[2]) atomic_add(&w.ge_low, int64_t(n[2]));
    if (s.kept[thread]) s.place[thread] = atomic_add(&w.inside, int64_t(s.kept[thread]));
  }

  PF_HD void count(Shared& s, const Unit& unit, int thread) const {
    const int64_t begin = unit.index * kSelectTile, end = smaller(begin + kSelectTile, s.size);
    const int64_t rows_end = s.one_by_one ? begin : begin + (end - begin) / V * V;
    const int slots = s.slots;
    Counts n[kSlots];
    if constexpr (kDtype >= 0) {
      Bounds bounds[kSlots];
      PF_UNROLL
      for (int k = 0; k < kSlots; ++k) {
        bounds[k].low = float_of(s.low[k] < kInfBits ? s.low[k] : kInfBits);
        bounds[k].high = float_of(s.high[k] < kInfBits ? s.high[k] : kInfBits);
      }
      PF_NO_UNROLL
      for (int64_t i = begin + int64_t(thread) * V; i < rows_end; i += kThreads * V)
        count_16_bytes(s, slots, bounds, i, n);
    }
    PF_UNROLL
    for (int k = 0; k < kSlots; ++k) {
      if (k >= slots) continue;
      PF_NO_UNROLL
      for (int64_t i = rows_end + thread; i < end; i += kThreads) count_by_bits(s, k, magnitude_bits(s.delta[k], i), n[k]);
    }
    PF_UNROLL
    for (int k = 0; k < kSlots; ++k) {
      add_all(&s.counts[k][0], n[k].gt_high), add_all(&s.counts[k][1], n[k].ge_high);
      add_all(&s.counts[k][2], n[k].ge_low);
    }
  }

  // Of finite magnitudes: nothing finite lies beyond infinity.
  struct Bounds {
    float low, high;
  };

  PF_HD void count_16_bytes(Shared& s, int slots, const Bounds (&bounds)[kSlots], int64_t i, Counts (&n)[kSlots]) const {
    typedef Packed<kDtype < 0 ? kF32 : kDtype> Words;
    constexpr int H = Words::kPerWord;
    const int64_t bytes = i * itemsize(kDtype);
    Words base, x[kSlots];
    base.load(at(s.base[0], bytes));
    PF_UNROLL
    for (int k = 0; k < kSlots; ++k)
      if (k < slots) x[k].load(at(s.x[k], bytes));
    PF_UNROLL
    for (int k = 0; k < kSlots; ++k) {
      if (k >= slots) continue;
      float d[V], infinite = 0.0f;
      PF_UNROLL
      for (int j = 0; j < V; ++j) {
        d[j] = fabsf(x[k].get(j / H, j % H) - base.get(j / H, j % H));
        infinite = sticky(infinite, d[j]);
      }
      if (!(infinite == 0.0f)) {
        PF_NO_UNROLL
        for (int j = 0; j < V; ++j) count_by_bits(s, k, magnitude_bits(s.delta[k], i + j), n[k]);
        continue;
      }
      PF_UNROLL
      for (int j = 0; j < V; ++j) {
        count_above(n[k].gt_high, d[j], bounds[k].high);
        count_from(n[k].ge_high, d[j], bounds[k].high);
        count_from(n[k].ge_low, d[j], bounds[k].low);
        if (d[j] > bounds[k].low && d[j] < bounds[k].high) keep_candidate(s, k, bits_of(d[j]));
      }
    }
  }
};

}  // namespace peta
