// Ranks within rows, and histograms of a whole model's magnitudes.
//
// A row is sorted by (|delta|, index) with a bitonic network: what is compared with what does not depend on the data.
#pragma once
#include "radix.h"

namespace peta {

static constexpr int kSorted = 1024, kSortedLog = 10;  // keys that a block sorts in shared memory

struct RankRows {
  Delta delta;
  int64_t begin_row, rows, columns, padded;  // padded: a power of two >= columns and >= kSorted
  uint64_t* keys;                            // [rows, padded]
};

struct SortShared {
  uint64_t keys[kSorted];
};

PF_HD void exchange(uint64_t& low, uint64_t& high, bool ascending) {
  const uint64_t a = low, b = high;
  if ((a > b) == ascending) low = b, high = a;
}

// Stage (k, j) of the network on the block's part of a row; `at`: where it begins within the row.
PF_HD void shared_stage(SortShared& s, int64_t at, int64_t k, int j, int thread) {
  const int i = 2 * j * (thread / j) + thread % j;
  exchange(s.keys[i], s.keys[i + j], ((at + i) & k) == 0);
}

// Reads the elements, or keys, and sorts runs of kSorted, every other one downwards.
struct SortRuns {
  static constexpr int kStages = kSortedLog * (kSortedLog + 1) / 2;
  static constexpr int kThreads = kSorted / 2, kBlocks = 2, kPhases = kStages + 2;
  typedef SortShared Shared;
  RankRows rows;

  static constexpr int size_of(int stage) {  // the log of k: stages 0 | 1 2 | 3 4 5 | ...
    int log = 1;
    while (stage >= log) stage -= log, ++log;
    return log;
  }
  static constexpr int step_of(int stage) {  // the log of j
    int log = 1;
    while (stage >= log) stage -= log, ++log;
    return log - 1 - stage;
  }

  template <int kPhase>
  PF_HD void phase(Shared& s, const Block& block) const {
    const int64_t runs = rows.padded / kSorted, row = block.index / runs, first = block.index % runs * kSorted;
    if constexpr (kPhase == 0) {
      for (int i = block.thread; i < kSorted; i += kThreads) {
        const int64_t column = first + i;
        s.keys[i] = ~uint64_t(0);
        if (column < rows.columns) {
          const uint32_t a = magnitude_bits(rows.delta, (rows.begin_row + row) * rows.columns + column);
          s.keys[i] = uint64_t(a) << 32 | uint64_t(column);
        }
      }
    } else if constexpr (kPhase <= kStages) {
      shared_stage(s, first, int64_t(1) << size_of(kPhase - 1), 1 << step_of(kPhase - 1), block.thread);
    } else {
      for (int i = block.thread; i < kSorted; i += kThreads) rows.keys[row * rows.padded + first + i] = s.keys[i];
    }
  }
};

// Stage (k, j) for j >= kSorted, in memory.
struct SortStage {
  static constexpr int kThreads = 256, kBlocks = 4, kPhases = 1;
  struct Shared {
    int32_t unused;
  };
  RankRows rows;
  int64_t k, j;

  template <int>
  PF_HD void phase(Shared&, const Block& block) const {
    const int64_t pair = block.index * kThreads + block.thread, half = rows.padded / 2;
    if (pair >= rows.rows * half) return;
    const int64_t in_row = pair % half, i = 2 * j * (in_row / j) + in_row % j;
    uint64_t* const keys = rows.keys + pair / half * rows.padded;
    exchange(keys[i], keys[i + j], (i & k) == 0);
  }
};

// Stages (k, j) for all j < kSorted.
struct SortEnds {
  static constexpr int kThreads = kSorted / 2, kBlocks = 2, kPhases = kSortedLog + 2;
  typedef SortShared Shared;
  RankRows rows;
  int64_t k;

  template <int kPhase>
  PF_HD void phase(Shared& s, const Block& block) const {
    uint64_t* const keys = rows.keys + block.index * kSorted;
    if constexpr (kPhase == 0) {
      for (int i = block.thread; i < kSorted; i += kThreads) s.keys[i] = keys[i];
    } else if constexpr (kPhase <= kSortedLog) {
      shared_stage(s, block.index * kSorted % rows.padded, k, kSorted >> kPhase, block.thread);
    } else {
      for (int i = block.thread; i < kSorted; i += kThreads) keys[i] = s.keys[i];
    }
  }
};

PF_HD float probability_of(const RankRows& rows, double low, double span, int64_t rank) {
  return float(rows.columns == 1 ? low + span * 0.5 : low + span * double(rank) / double(rows.columns - 1));
}

// Rows too short to be worth sorting: an element counts who stands before it.
static constexpr int64_t kShortRow = 64;

struct RankShortRows {
  static constexpr int kThreads = 256, kBlocks = 4, kPhases = 1;
  struct Shared {
    int32_t unused;
  };
  RankRows rows;
  double low, span;
  float* out;  // [rows, columns]

  template <int>
  PF_HD void phase(Shared&, const Block& block) const {
    const int64_t i = block.index * kThreads + block.thread;
    if (i >= rows.rows * rows.columns) return;
    const int64_t column = i % rows.columns, first = rows.begin_row * rows.columns + i - column;
    const uint32_t mine = magnitude_bits(rows.delta, first + column);
    int64_t rank = 0;
    for (int64_t j = 0; j < rows.columns; ++j) {
      const uint32_t other = magnitude_bits(rows.delta, first + j);
      rank += other < mine || (other == mine && j < column);
    }
    out[i] = probability_of(rows, low, span, rank);
  }
};

struct RankToProbability {
  static constexpr int kThreads = 256, kBlocks = 4, kPhases = 1;
  struct Shared {
    int32_t unused;
  };
  RankRows rows;
  double low, span;
  float* out;  // [rows, columns]

  template <int>
  PF_HD void phase(Shared&, const Block& block) const {
    const int64_t i = block.index * kThreads + block.thread;
    if (i >= rows.rows * rows.columns) return;
    const int64_t row = i / rows.columns, rank = i % rows.columns;
    const int64_t column = int64_t(rows.keys[row * rows.padded + rank] & 0xffffffffu);
    out[row * rows.columns + column] = probability_of(rows, low, span, rank);
  }
};

// bins += elements by the upper 16 of their 31 bits, or, of those whose upper 16 are `prefix`, by their lower 15. Most
// magnitudes lie within 32 binades, whose bins fit into shared memory; zeros have a register.
struct Histogram {
  static constexpr int kThreads = 256, kBlocks = 4, kPhases = 3;
  static constexpr uint32_t kFirst = 100u << 8, kWindow = 8192;
  struct Shared {
    uint32_t bins[kWindow], zeros;
  };
  Delta delta;
  int64_t size, each;  // elements a block
  uint64_t* bins;
  int32_t prefix;

  template <int kPhase>
  PF_HD void phase(Shared& s, const Block& block) const {
    if constexpr (kPhase == 0) {
      if (block.thread == 0) s.zeros = 0;
      for (uint32_t i = uint32_t(block.thread); i < kWindow; i += kThreads) s.bins[i] = 0;
    } else if constexpr (kPhase == 1) {
      const int64_t begin = block.index * each, end = smaller(begin + each, size);
      uint32_t zeros = 0;
      for (int64_t i = begin + block.thread; i < end; i += kThreads) {
        const uint32_t a = magnitude_bits(delta, i), bin = a >> 15;
        if (prefix >= 0) {
          if (bin == uint32_t(prefix)) count_in(reinterpret_cast<int64_t*>(bins), a & 0x7fffu);
        } else if (bin == 0) {
          ++zeros;
        } else if (bin - kFirst < kWindow) {
          atomic_add(&s.bins[bin - kFirst], 1u);
        } else {
          atomic_add(reinterpret_cast<int64_t*>(bins + bin), int64_t(1));
        }
      }
      add_all(&s.zeros, zeros);
    } else if (prefix < 0) {
      if (block.thread == 0 && s.zeros) atomic_add(reinterpret_cast<int64_t*>(bins), int64_t(s.zeros));
      for (uint32_t i = uint32_t(block.thread); i < kWindow; i += kThreads)
        if (s.bins[i]) atomic_add(reinterpret_cast<int64_t*>(bins + kFirst + i), int64_t(s.bins[i]));
    }
  }
};

}  // namespace peta
