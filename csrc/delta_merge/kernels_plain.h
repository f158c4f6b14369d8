// The common merges: all inputs and the output of one dtype, differences from a base, all entries or the top ones,
// weights by task, and a plain sum or the mean of those that agree with the sign of the weighted sum.
//
// Per thread and step 16 bytes of the base and of every model are under way at once; two elements are then worked on at
// a time, so that few registers hold sums. Whatever is not finite, and every overflow, shows in the total or in what
// would be written: then nothing is, and the general algebra goes over these elements again and says what is wrong.
#pragma once
#include "kernels.h"

namespace peta {

struct PlainTask {
  uint64_t x;
  float weight, below;  // kept where !(|d| <= below)
};

template <int32_t kDtype, bool kElecting, int kMostTasks>
struct PlainMerge {
  static constexpr int kThreads = kMergeThreads, kBlocks = kMostTasks <= 4 ? 4 : 2, kPhases = 3;
  static constexpr int V = Packed<kDtype>::kElements, H = Packed<kDtype>::kPerWord;
  struct Shared {
    StagedPiece staged;
    PlainTask plain[kMostTasks];
    uint32_t general;
  };
  MergeTables tables;

  template <int kPhase>
  PF_HD void phase(Shared& s, const Block& block) const {
    if constexpr (kPhase == 0) {
      if (block.thread == 0) s.general = 0;
      stage(s.staged, tables, block, kThreads);
    } else if constexpr (kPhase == 1) {
      simplify(s, block);
    } else {
      merge(s, block);
    }
  }

  // One threshold for the whole tile, unless an exact count ends within it or a threshold would hide infinities.
  PF_HD void simplify(Shared& s, const Block& block) const {
    const int t = block.thread;
    if (t >= kMostTasks || t >= s.staged.piece.tasks) return;
    const Task& task = s.staged.tasks[t];
    const Span span = span_of(tables.tiles[block.index], s.staged.piece.size);
    const int64_t first = s.staged.piece.start + span.begin, last = s.staged.piece.start + span.end - 1;
    float below = -1.0f;
    if (task.keep == kKeepTop) {
      const bool equals_kept = task.low_index >= last;
      if (!equals_kept && task.low_index >= first) atomic_or(&s.general, 1u);
      if (task.low >= kInfBits) atomic_or(&s.general, 1u);
      else if (!equals_kept) below = float_of(task.low);
      else if (task.low) below = float_of(task.low - 1u);
    }
    s.plain[t].x = task.x, s.plain[t].weight = task.weight, s.plain[t].below = below;
  }

  PF_HD void merge(Shared& s, const Block& block) const {
    const Piece& piece = s.staged.piece;
    const Span span = span_of(tables.tiles[block.index], piece.size);
    uint32_t bad = 0, largest = 0;
    PF_NO_UNROLL
    for (int64_t i = span.begin + int64_t(block.thread) * V; i < span.end; i += kThreads * V) {
      if (!s.general && i + V <= span.end && merge_16_bytes(s, i)) continue;
      const int64_t end = smaller(i + V, span.end);
      PF_NO_UNROLL
      for (int64_t k = i; k < end; ++k)
        merge_row<-1, 1, kElecting, false>(piece, s.staged.tasks, s.staged.rule, k, bad, largest);
    }
    tell_nonfinite(tables.pieces[tables.tiles[block.index].piece], bad, largest, kDtype);
  }

  // False, with nothing written, when something is not finite.
  PF_HD bool merge_16_bytes(const Shared& s, int64_t i) const {
    const Piece& piece = s.staged.piece;
    const Rule& rule = s.staged.rule;
    const int64_t bytes = i * itemsize(kDtype);
    const int T = piece.tasks;
    Packed<kDtype> base, x[kMostTasks], out;
    base.load(at(piece.base, bytes), aligned(at(piece.base, bytes), 16));
    PF_UNROLL
    for (int t = 0; t < kMostTasks; ++t)
      if (t < T) x[t].load(at(s.plain[t].x, bytes), aligned(at(s.plain[t].x, bytes), 16));
    float infinite = 0.0f, largest = 0.0f;  // NaN once a total is not finite; the largest |result|
    PF_UNROLL
    for (int k = 0; k < 4; ++k) {
      float y[H];
      PF_UNROLL
      for (int half = 0; half < H; ++half) {
        const float b = base.get(k, half);
        float weighted[kMostTasks], total = 0.0f;
        PF_UNROLL
        for (int t = 0; t < kMostTasks; ++t) {
          weighted[t] = 0.0f;
          if (t < T) {
            const float d = x[t].get(k, half) - b;
            weighted[t] = fabsf(d) <= s.plain[t].below ? 0.0f : d * s.plain[t].weight;
            total = total + weighted[t];
          }
        }
        infinite = infinite + total * 0.0f;
        const float added = kElecting ? agreeing_mean(s, weighted, total) : divided(total, 0.0f, rule);
        const float scaled = added * rule.scaling;
        y[half] = scaled == 0.0f ? b : b + scaled;
        largest = fmaxf(largest, fabsf(y[half]));
      }
      out.set(k, y);
    }
    if (!(infinite == 0.0f) || !(largest < float_of(first_overflow(kDtype)))) return false;
    uint8_t* const to = const_cast<uint8_t*>(at(piece.out, bytes));
    out.store(to, aligned(to, 16));
    return true;
  }

  // 0 where none agrees.
  PF_HD float agreeing_mean(const Shared& s, const float (&weighted)[kMostTasks], float total) const {
    const float sign = total > 0.0f ? 1.0f : total < 0.0f ? -1.0f : float(s.staged.rule.zero_sign);
    float sum = 0.0f, divisor = 0.0f;
    PF_UNROLL
    for (int t = 0; t < kMostTasks; ++t) {
      if (t < s.staged.piece.tasks && weighted[t] * sign > 0.0f) {
        sum = sum + weighted[t];
        divisor = divisor + s.plain[t].weight;
      }
    }
    return divisor == 0.0f ? sum : sum / divisor;
  }
};

// Neither 0 nor so large that finite sums times it give NaN.
inline bool is_ordinary(float x) { return x != 0.0f && fabsf(x) < 1e30f; }

// Whether PlainMerge with room for that many tasks serves; the dtype is the output's.
inline bool is_plain(const Piece& piece, const Task* tasks, const Rule& rule, int most_tasks) {
  if (rule.base_kind != kBaseTensor || rule.aggregate != kSum || rule.floor != 0.0f) return false;
  if (!piece.tasks || piece.tasks > most_tasks || piece.out_dtype != piece.base_dtype) return false;
  const bool ties = rule.elect == kElectWeighted && rule.divide == kDivideAgreeingWeight;
  if (!ties && !(rule.elect == kElectNone && rule.divide == kDivideConstant)) return false;
  if (rule.zero_sign < -1 || rule.zero_sign > 1 || !is_ordinary(rule.scaling) || !is_ordinary(rule.divisor)) return false;
  for (int t = 0; t < piece.tasks; ++t) {
    const Task& k = tasks[t];
    if (k.dtype != piece.base_dtype || k.is_delta || k.mask || k.weights || k.prescale != 1.0f) return false;
    if ((k.keep != kKeepAll && k.keep != kKeepTop) || !(fabsf(k.weight) < 1e30f)) return false;
  }
  return true;
}

}  // namespace peta
