// Every other merge, the norms of what is kept, and the sign of the model's majority.
#pragma once
#include "kernels.h"

namespace peta {

// kDtype: of base, models and output, where it is one and V is 8; else -1 and V is 4.
template <int32_t kDtype, int V, bool kElecting, bool kExtreme>
struct GeneralMerge {
  static constexpr int kThreads = kMergeThreads, kBlocks = 2, kPhases = 3;
  typedef StagedPiece Shared;
  MergeTables tables;

  template <int kPhase>
  PF_HD void phase(Shared& s, const Block& block) const {
    if constexpr (kPhase == 0) stage(s, tables, block, kThreads);
    else if constexpr (kPhase == 1) look_at_addresses<V>(s, tasks_of(s, tables), block, kThreads);
    else merge(s, block);
  }

  PF_HD void merge(Shared& s, const Block& block) const {
    const Task* const tasks = tasks_of(s, tables);
    const Span span = span_of(tables.tiles[block.index], s.piece.size);
    const int64_t rows_end = s.one_by_one ? span.begin : span.begin + (span.end - span.begin) / V * V;
    uint32_t bad = 0, largest = 0;
    PF_NO_UNROLL
    for (int64_t i = span.begin + int64_t(block.thread) * V; i < rows_end; i += kThreads * V)
      merge_row<kDtype, V, kElecting, kExtreme>(s.piece, tasks, s.rule, i, bad, largest);
    PF_NO_UNROLL
    for (int64_t i = rows_end + block.thread; i < span.end; i += kThreads)
      merge_row<-1, 1, kElecting, kExtreme>(s.piece, tasks, s.rule, i, bad, largest);
    tell_nonfinite(tables.pieces[tables.tiles[block.index].piece], bad, largest, s.piece.out_dtype);
  }
};

// One element's base and, t by t, its weighted contributions.
struct OneElement {
  const Piece& piece;
  const Task* tasks;
  const Rule& rule;
  int64_t i;

  PF_HD float base() const { return base_element(piece.base, rule.base_kind, piece.base_dtype, i); }

  // d in `delta`, and what is kept of it, masked and prescaled.
  PF_HD float of(int t, float base, uint32_t& bad, float* delta = nullptr) const {
    const Task& task = tasks[t];
    float x[1] = {load_element(at(task.x, i * itemsize(task.dtype)), task.dtype)};
    const float from[1] = {base};
    if (delta) *delta = task.is_delta ? x[0] : subtract(x[0], base);
    contribution<1>(x, from, task, i, piece.start + i, bad);
    return x[0];
  }

  PF_HD float weight(int t, uint32_t& bad) const {
    float w[1];
    weights_of<1>(w, tasks[t], i, bad);
    return w[0];
  }
};

// The lower median of the T weighted contributions, by insertion, in as many of the block's threads as there is room for.
struct MedianMerge {
  static constexpr int kThreads = 256, kBlocks = 2, kPhases = 2;
  static constexpr int kRoom = 6144;  // values
  struct Shared {
    StagedPiece staged;
    float sorted[kRoom];
  };
  MergeTables tables;

  template <int kPhase>
  PF_HD void phase(Shared& s, const Block& block) const {
    if constexpr (kPhase == 0) stage(s.staged, tables, block, kThreads);
    else merge(s, block);
  }

  PF_HD void merge(Shared& s, const Block& block) const {
    const Piece& piece = s.staged.piece;
    const Rule& rule = s.staged.rule;
    const Task* const tasks = tasks_of(s.staged, tables);
    const Span span = span_of(tables.tiles[block.index], piece.size);
    const int active = int(smaller(kThreads, kRoom / piece.tasks));
    if (block.thread >= active) return;
    float* const sorted = s.sorted + block.thread;  // the j-th at j * active
    uint32_t bad = 0, largest = 0;
    PF_NO_UNROLL
    for (int64_t i = span.begin + block.thread; i < span.end; i += active) {
      const OneElement element{piece, tasks, rule, i};
      const float base = element.base();
      PF_NO_UNROLL
      for (int t = 0; t < piece.tasks; ++t) {
        const float e = element.of(t, base, bad);
        insert(sorted, active, t, e * element.weight(t, bad));
      }
      const float y = with_base(divided(sorted[(piece.tasks - 1) / 2 * active], 0.0f, rule), base, rule);
      if (rule.base_kind == kBaseTensor) {
        const uint32_t a = bits_of(base) & kAbsMask;
        bad = a > bad ? a : bad;
      }
      const uint32_t a =
          store_element(const_cast<uint8_t*>(at(piece.out, i * itemsize(piece.out_dtype))), piece.out_dtype, y);
      largest = a > largest ? a : largest;
    }
    tell_nonfinite(tables.pieces[tables.tiles[block.index].piece], bad, largest, piece.out_dtype);
  }

  PF_HD void insert(float* sorted, int stride, int have, float v) const {
    PF_NO_UNROLL
    for (int j = 0; j < have; ++j) {
      const float other = sorted[j * stride];
      if (other > v) sorted[j * stride] = v, v = other;
    }
    sorted[have * stride] = v;
  }
};

// Sums of |d| and of |kept d| over blocks of 4096 elements: 32 interleaved lanes, then halves onto halves. A warp takes
// one block and task at a time; its threads are the lanes.
struct KeptNorm {
  static constexpr int kThreads = 256, kBlocks = 2, kPhases = 3, kWarps = kThreads / 32;
  struct Shared {
    StagedPiece staged;
    double lanes[kWarps][2][32];
  };
  MergeTables tables;

  template <int kPhase>
  PF_HD void phase(Shared& s, const Block& block) const {
    if constexpr (kPhase == 0) stage(s.staged, tables, block, kThreads);
    else if constexpr (kPhase == 1) add_lanes(s, block);
    else add_halves(s, block);
  }

  // A tile here is one block and kWarps tasks of it, so that lanes stay in shared memory between the phases:
  // tile.index = block * groups + group of tasks.
  PF_HD void place(const Shared& s, const Block& block, int64_t& first, int& task) const {
    const int groups = (s.staged.piece.tasks + kWarps - 1) / kWarps, index = tables.tiles[block.index].index;
    first = int64_t(index / groups) * kBlock;
    task = index % groups * kWarps + block.thread / 32;
  }

  PF_HD void add_lanes(Shared& s, const Block& block) const {
    const Piece& piece = s.staged.piece;
    const Task* const tasks = tasks_of(s.staged, tables);
    const int lane = block.thread % 32, warp = block.thread / 32;
    int64_t first;
    int task;
    place(s, block, first, task);
    double whole = 0.0, kept = 0.0;
    if (task < piece.tasks) {
      uint32_t bad = 0;
      PF_NO_UNROLL
      for (int64_t i = first + lane; i < smaller(first + kBlock, piece.size); i += 32) {
        const OneElement element{piece, tasks, s.staged.rule, i};
        float d;
        const float e = element.of(task, element.base(), bad, &d);
        whole = whole + double(fabsf(d)), kept = kept + double(fabsf(e));
      }
    }
    s.lanes[warp][0][lane] = whole, s.lanes[warp][1][lane] = kept;
  }

  PF_HD void add_halves(Shared& s, const Block& block) const {
    const int lane = block.thread % 32, warp = block.thread / 32;
    int64_t first;
    int task;
    place(s, block, first, task);
    if (lane >= 2 || task >= s.staged.piece.tasks) return;
    double* const v = s.lanes[warp][lane];
    PF_NO_UNROLL
    for (int half = 16; half; half /= 2)
      for (int j = 0; j < half; ++j) v[j] = v[j] + v[j + half];
    double* const partials = reinterpret_cast<double*>(s.staged.piece.partials);
    partials[(first / kBlock * s.staged.piece.tasks + task) * 2 + lane] = v[0];
  }
};

// The sum over a piece of the sign of the elected total.
struct SignTotal {
  static constexpr int kThreads = kMergeThreads, kBlocks = 2, kPhases = 3;
  struct Shared {
    StagedPiece staged;
    uint32_t above, below;
  };
  MergeTables tables;

  template <int kPhase>
  PF_HD void phase(Shared& s, const Block& block) const {
    if constexpr (kPhase == 0) {
      if (block.thread == 0) s.above = s.below = 0;
      stage(s.staged, tables, block, kThreads);
    } else if constexpr (kPhase == 1) {
      count(s, block);
    } else if (block.thread == 0) {
      const int64_t total = int64_t(s.above) - int64_t(s.below);
      if (total) atomic_add(&tables.pieces[tables.tiles[block.index].piece].sign_total, total);
    }
  }

  PF_HD void count(Shared& s, const Block& block) const {
    const Piece& piece = s.staged.piece;
    const Task* const tasks = tasks_of(s.staged, tables);
    const Span span = span_of(tables.tiles[block.index], piece.size);
    uint32_t above = 0, below = 0, bad = 0;
    PF_NO_UNROLL
    for (int64_t i = span.begin + block.thread; i < span.end; i += kThreads) {
      const OneElement element{piece, tasks, s.staged.rule, i};
      const float base = element.base();
      Sums<true> sums;
      PF_NO_UNROLL
      for (int t = 0; t < piece.tasks; ++t) {
        const float e = element.of(t, base, bad);
        accumulate<true, false>(sums, s.staged.rule, e, element.weight(t, bad));
      }
      above += sums.total > 0.0f, below += sums.total < 0.0f;
    }
    add_all(&s.above, above), add_all(&s.below, below);
  }
};

}  // namespace peta
