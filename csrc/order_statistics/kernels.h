// Exact order statistics of |delta| on a device, for many tensors in one go and without asking the host in between.
//
// A tensor of up to kSmall elements is one block's work. Of a larger one a sample brackets the rank, one streaming pass
// counts what lies above the bracket and at its ends and keeps what lies inside, and histograms decide among those few.
// Where the bracket misses, the same histograms go over the tensor itself. The kernels are launched all the same and
// find nothing to do.
// Floor: base and T models read once for all tasks, 2 (T + 1) bytes an element in bf16.
#pragma once
#include "order_statistics.h"
#include "radix.h"

namespace peta {

static constexpr int kSelectThreads = 256;
static constexpr int64_t kSmall = 65536;
static constexpr int64_t kSelectTile = 16384;
static constexpr int kSlots = 4;      // queries that share one reading of a tile
static constexpr int kStaged = 768;   // values inside a bracket that a block keeps for each on their way to memory
static constexpr int64_t kChunk = 65536;  // values of an array that a block counts at once

enum Status : int32_t { kStreaming = 0, kInside = 1, kMissed = 2, kFound = 3 };

// One query of a large tensor.
struct Wanted {
  int64_t query;       // place of its SelectQuery
  int64_t high_radix;  // places of the Radix of both ends of its bracket; low_radix the next. -1 where an end is open
  int64_t low_radix;
  uint64_t candidates;
  int64_t capacity;
  uint64_t tile_equals;  // uint32 a tile, where an index is wanted; else 0
  int64_t gt_high, ge_high, ge_low, inside;
  uint32_t low, high;
  int32_t status, task;
};

// A tile, and the queries (places in the Wanted table) that read it; -1 for none. All of one tensor's tasks.
struct Unit {
  int32_t slots[kSlots];
  int64_t index;
};

struct SampleUnit {
  int32_t task, pad;
  int64_t first_run, runs, all_runs;
  uint64_t to;
};

struct ArrayUnit {
  int64_t radix, first;
};

struct SelectTables {  // everything in device memory
  const SelectTask* tasks;
  SelectQuery* queries;
  Wanted* wanted;
  Radix* radix;
  uint64_t* bins;    // [radixes, kBins]
  uint32_t* missed;  // whether any bracket has
  const Unit* units;
  const SampleUnit* samples;
  const ArrayUnit* arrays;
  const int64_t* small;  // places of queries
  const int32_t* small_tasks;
  int64_t num_wanted, num_radix, num_units, num_samples, num_arrays, num_small;
};

// ---------------------------------------------------------------- small tensors: one block each

// The nth (from 1) element whose magnitude is `value`: every thread counts its part of [begin, end).
struct Finder {
  uint32_t counts[kSelectThreads];

  PF_HD void part(int64_t begin, int64_t end, int thread, int64_t* from, int64_t* to) const {
    const int64_t each = ceil_div(end - begin, kSelectThreads);
    *from = smaller(begin + thread * each, end), *to = smaller(*from + each, end);
  }
  PF_HD void count(const Delta& delta, int64_t begin, int64_t end, uint32_t value, int thread) {
    int64_t from, to;
    part(begin, end, thread, &from, &to);
    uint32_t n = 0;
    for (int64_t i = from; i < to; ++i) n += magnitude_bits(delta, i) == value;
    counts[thread] = n;
  }
  PF_HD int64_t find(const Delta& delta, int64_t begin, int64_t end, uint32_t value, int64_t nth) const {
    int thread = 0;
    for (; thread < kSelectThreads - 1 && nth > int64_t(counts[thread]); ++thread) nth -= counts[thread];
    int64_t from, to;
    part(begin, end, thread, &from, &to);
    for (int64_t i = from; i < to; ++i)
      if (magnitude_bits(delta, i) == value && --nth == 0) return i;
    return end - 1;  // not reached
  }
};

PF_HD bool wants_index(const SelectQuery& q) { return q.pad == 0; }

struct SmallSelect {
  static constexpr int kThreads = kSelectThreads, kBlocks = 4, kPhases = 4 * kRounds + 3;
  struct Shared {
    Radix radix;
    int64_t groups[kBinGroups];
    uint32_t bins[kBins];
    Finder finder;
  };
  SelectTables tables;

  template <int kPhase>
  PF_HD void phase(Shared& s, const Block& block) const {
    const SelectTask& task = tables.tasks[tables.small_tasks[block.index]];
    SelectQuery& query = tables.queries[tables.small[block.index]];
    if constexpr (kPhase < 4 * kRounds) {
      constexpr int kRound = kPhase / 4, kStep = kPhase % 4;
      if constexpr (kStep == 0) {
        if (block.thread == 0 && kRound == 0) s.radix = Radix{0, task.size, query.count, 0, 0, 0, 0};
        for (int i = block.thread; i < kBins; i += kThreads) s.bins[i] = 0;
      } else if constexpr (kStep == 1) {
        for (int64_t i = block.thread; i < task.size; i += kThreads) {
          uint32_t bin;
          if (bin_of(magnitude_bits(task.delta, i), s.radix.prefix, kRound, &bin)) atomic_add(&s.bins[bin], 1u);
        }
      } else if constexpr (kStep == 2) {
        add_groups(s.bins, s.groups, block.thread);
      } else if (block.thread == 0) {
        narrow(s.radix, s.bins, s.groups, kRound);
      }
    } else {
      last_phases<kPhase - 4 * kRounds>(s, task, query, block);
    }
  }

  template <int kStep>
  PF_HD void last_phases(Shared& s, const SelectTask& task, SelectQuery& query, const Block& block) const {
    if constexpr (kStep == 0) {
      if (block.thread != 0) return;
      query.threshold = s.radix.prefix, query.above = s.radix.above, query.equal = s.radix.equal;
      query.last_index = INT64_MAX;
    } else if constexpr (kStep == 1) {
      if (s.radix.count < s.radix.equal && wants_index(query))
        s.finder.count(task.delta, 0, task.size, s.radix.prefix, block.thread);
    } else {
      if (block.thread == 0 && s.radix.count < s.radix.equal && wants_index(query))
        query.last_index = s.finder.find(task.delta, 0, task.size, s.radix.prefix, s.radix.count);
    }
  }
};

// ---------------------------------------------------------------- a sample

struct TakeSample {
  static constexpr int kThreads = 256, kBlocks = 4, kPhases = 1, kRun = 32;
  struct Shared {
    int32_t unused;
  };
  SelectTables tables;

  template <int>
  PF_HD void phase(Shared&, const Block& block) const {
    const SampleUnit& unit = tables.samples[block.index];
    const SelectTask& task = tables.tasks[unit.task];
    const int64_t stride = task.size / unit.all_runs;
    uint32_t* const to = reinterpret_cast<uint32_t*>(unit.to);
    const int lane = block.thread % kRun;
    for (int64_t run = block.thread / kRun; run < unit.runs; run += kThreads / kRun) {
      const int64_t j = unit.first_run + run;
      const uint64_t scattered = (uint64_t(j) + 1) * 0x9E3779B97F4A7C15u >> 20;
      const int64_t first = j * stride + int64_t(scattered % uint64_t(stride - kRun + 1));
      to[run * kRun + lane] = magnitude_bits(task.delta, first + lane);
    }
  }
};

// ---------------------------------------------------------------- histograms of arrays and of tensors

struct RadixShared {
  uint32_t bins[kBins];
};

PF_HD void flush_bins(const RadixShared& s, uint64_t* to, int thread, int threads) {
  for (int i = thread; i < kBins; i += threads)
    if (s.bins[i]) atomic_add(reinterpret_cast<int64_t*>(to + i), int64_t(s.bins[i]));
}

struct CountArrays {
  static constexpr int kThreads = 256, kBlocks = 4, kPhases = 3;
  typedef RadixShared Shared;
  SelectTables tables;
  int round;

  template <int kPhase>
  PF_HD void phase(Shared& s, const Block& block) const {
    const ArrayUnit& unit = tables.arrays[block.index];
    const Radix& r = tables.radix[unit.radix];
    if (!r.count || !r.values || unit.first >= r.size) return;
    if constexpr (kPhase == 0) {
      for (int i = block.thread; i < kBins; i += kThreads) s.bins[i] = 0;
    } else if constexpr (kPhase == 1) {
      const uint32_t* const values = reinterpret_cast<const uint32_t*>(r.values);
      const int64_t end = smaller(unit.first + kChunk, r.size);
      for (int64_t i = unit.first + block.thread; i < end; i += kThreads) {
        uint32_t bin;
        if (bin_of(values[i], r.prefix, round, &bin)) atomic_add(&s.bins[bin], 1u);
      }
    } else {
      flush_bins(s, tables.bins + unit.radix * kBins, block.thread, kThreads);
    }
  }
};

// Where the bracket missed, over the tensor. A block walks through the tiles; few have anything to do.
struct CountTensors {
  static constexpr int kThreads = 256, kBlocks = 4, kPhases = 1;
  typedef RadixShared Shared;
  SelectTables tables;
  int round;

  template <int>
  PF_HD void phase(Shared&, const Block& block) const {
    if (!*tables.missed) return;
    for (int64_t u = block.index; u < tables.num_units; u += block.count) {
      for (int k = 0; k < kSlots; ++k) {
        const int32_t slot = tables.units[u].slots[k];
        if (slot < 0 || tables.wanted[slot].status != kMissed) continue;
        const Wanted& w = tables.wanted[slot];
        const Radix& r = tables.radix[w.low_radix];
        const SelectTask& task = tables.tasks[w.task];
        const int64_t begin = tables.units[u].index * kSelectTile, end = smaller(begin + kSelectTile, task.size);
        int64_t* const bins = reinterpret_cast<int64_t*>(tables.bins + w.low_radix * kBins);
        for (int64_t i = begin + block.thread; i < end; i += kThreads) {
          uint32_t bin;
          if (bin_of(magnitude_bits(task.delta, i), r.prefix, round, &bin)) count_in(bins, bin);
        }
      }
    }
  }
};

struct NarrowAll {
  static constexpr int kThreads = 64, kBlocks = 8, kPhases = 3;
  struct Shared {
    int64_t groups[kBinGroups];
  };
  SelectTables tables;
  int round;

  template <int kPhase>
  PF_HD void phase(Shared& s, const Block& block) const {
    Radix& r = tables.radix[block.index];
    if (!r.count) return;
    uint64_t* const bins = tables.bins + block.index * kBins;
    if constexpr (kPhase == 0) {
      add_groups(bins, s.groups, block.thread);
    } else if constexpr (kPhase == 1) {
      if (block.thread == 0) narrow(r, bins, s.groups, round);
    } else {
      for (int i = block.thread; i < kBins; i += kThreads) bins[i] = 0;
    }
  }
};

// ---------------------------------------------------------------- brackets, decisions, results: a thread a query

// What Kernel::of does, by one thread for every query of a large tensor.
template <class Kernel>
struct EveryQuery {
  static constexpr int kThreads = 64, kBlocks = 4, kPhases = 1;
  struct Shared {
    int32_t unused;
  };
  SelectTables tables;

  int64_t blocks() const { return ceil_div(tables.num_wanted, kThreads); }

  template <int>
  PF_HD void phase(Shared&, const Block& block) const {
    const int64_t i = block.index * kThreads + block.thread;
    if (i < tables.num_wanted) static_cast<const Kernel*>(this)->of(tables.wanted[i]);
  }
};

struct SetBrackets : EveryQuery<SetBrackets> {
  PF_HD void of(Wanted& w) const {
    w.high = tables.radix[w.high_radix].count ? tables.radix[w.high_radix].prefix : kAbsMask;
    w.low = tables.radix[w.low_radix].count ? tables.radix[w.low_radix].prefix : 0u;
  }
};

struct Decide : EveryQuery<Decide> {
  PF_HD void of(Wanted& w) const {
    SelectQuery& q = tables.queries[w.query];
    Radix& r = tables.radix[w.low_radix];
    tables.radix[w.high_radix].count = 0;
    r = Radix{0, 0, 0, 0, 0, 0, w.task};
    const int64_t equal_high = w.ge_high - w.gt_high, equal_low = w.low == w.high ? 0 : w.ge_low - w.ge_high - w.inside;
    w.status = kFound;
    if (q.count > w.gt_high && q.count <= w.ge_high) {
      q.threshold = w.high, q.above = w.gt_high, q.equal = equal_high;
    } else if (q.count > w.ge_high && q.count <= w.ge_high + w.inside && w.inside <= w.capacity) {
      w.status = kInside;
      r.values = w.candidates, r.size = w.inside, r.count = q.count - w.ge_high, r.above = w.ge_high;
    } else if (q.count > w.ge_high + w.inside && q.count <= w.ge_high + w.inside + equal_low) {
      q.threshold = w.low, q.above = w.ge_high + w.inside, q.equal = equal_low;
    } else {
      w.status = kMissed;
      r.count = q.count;
      atomic_or(tables.missed, 1u);
    }
  }
};

struct Finish : EveryQuery<Finish> {
  PF_HD void of(const Wanted& w) const {
    SelectQuery& q = tables.queries[w.query];
    const Radix& r = tables.radix[w.low_radix];
    if (w.status != kFound) q.threshold = r.prefix, q.above = r.above, q.equal = r.equal;
    q.last_index = INT64_MAX;
  }
};

// ---------------------------------------------------------------- where the equals end

PF_HD bool needs_index(const SelectQuery& q) { return wants_index(q) && q.count - q.above < q.equal; }

struct CountEquals {
  static constexpr int kThreads = 256, kBlocks = 4, kPhases = 3;
  struct Shared {
    uint32_t counts[kSlots];
  };
  SelectTables tables;

  template <int kPhase>
  PF_HD void phase(Shared& s, const Block& block) const {
    if constexpr (kPhase == 0) {
      if (block.thread < kSlots) s.counts[block.thread] = 0;
    } else {
      const Unit& unit = tables.units[block.index];
      for (int k = 0; k < kSlots; ++k)
        if (unit.slots[k] >= 0) of_slot<kPhase>(s, unit, k, block.thread);
    }
  }

  template <int kPhase>
  PF_HD void of_slot(Shared& s, const Unit& unit, int k, int thread) const {
    const Wanted& w = tables.wanted[unit.slots[k]];
    const SelectQuery& q = tables.queries[w.query];
    if (!w.tile_equals || !needs_index(q)) return;
    if constexpr (kPhase == 1) {
      const SelectTask& task = tables.tasks[w.task];
      const int64_t begin = unit.index * kSelectTile, end = smaller(begin + kSelectTile, task.size);
      uint32_t n = 0;
      for (int64_t i = begin + thread; i < end; i += kThreads) n += magnitude_bits(task.delta, i) == q.threshold;
      add_all(&s.counts[k], n);
    } else if (thread == 0) {
      reinterpret_cast<uint32_t*>(w.tile_equals)[unit.index] = s.counts[k];
    }
  }
};

struct Locate {
  static constexpr int kThreads = kSelectThreads, kBlocks = 4, kPhases = 4;
  struct Shared {
    int64_t sums[kSelectThreads];
    int64_t tile, nth;
    Finder finder;
  };
  SelectTables tables;

  template <int kPhase>
  PF_HD void phase(Shared& s, const Block& block) const {
    const Wanted& w = tables.wanted[block.index];
    SelectQuery& q = tables.queries[w.query];
    if (!w.tile_equals || !needs_index(q)) return;
    const SelectTask& task = tables.tasks[w.task];
    const uint32_t* const counts = reinterpret_cast<const uint32_t*>(w.tile_equals);
    const int64_t tiles = ceil_div(task.size, kSelectTile), each = ceil_div(tiles, kThreads);
    const int64_t from = smaller(block.thread * each, tiles), to = smaller(from + each, tiles);
    if constexpr (kPhase == 0) {
      int64_t sum = 0;
      for (int64_t i = from; i < to; ++i) sum += counts[i];
      s.sums[block.thread] = sum;
    } else if constexpr (kPhase == 1) {
      if (block.thread != 0) return;
      int64_t nth = q.count - q.above, part = 0;
      for (; part < kThreads - 1 && nth > s.sums[part]; ++part) nth -= s.sums[part];
      int64_t tile = smaller(part * each, tiles - 1);
      for (; tile < tiles - 1 && nth > int64_t(counts[tile]); ++tile) nth -= counts[tile];
      s.tile = tile, s.nth = nth;
    } else {
      const int64_t begin = s.tile * kSelectTile, end = smaller(begin + kSelectTile, task.size);
      if constexpr (kPhase == 2) s.finder.count(task.delta, begin, end, q.threshold, block.thread);
      else if (block.thread == 0) q.last_index = s.finder.find(task.delta, begin, end, q.threshold, s.nth);
    }
  }
};

}  // namespace peta
