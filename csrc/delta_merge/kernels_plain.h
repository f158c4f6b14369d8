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

// The sum of the weights of one set of tasks, added in their order, and its inverse.
struct Share {
  float divisor, inverse;
};

// For up to kMostTasks tasks; of 3 and 4 exactly so many.
template <int32_t kDtype, bool kElecting, int kMostTasks>
struct PlainMerge {
  static constexpr int kThreads = kMergeThreads, kBlocks = kMostTasks == 3 ? 3 : 2, kPhases = 4;
  static constexpr int V = Packed<kDtype>::kElements, H = Packed<kDtype>::kPerWord;
  static constexpr bool kExact = kMostTasks == 3;
  static constexpr bool kShares = kElecting && kMostTasks <= 4;  // more sets than that take more than a division
  static constexpr int kSets = kShares ? 1 << kMostTasks : 1;
  struct Shared {
    StagedPiece staged;
    PlainTask plain[kMostTasks];
    Share shares[kSets];
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
    } else if constexpr (kPhase == 2) {
      add_shares(s, block.thread);
    } else {
      merge(s, block);
    }
  }

  // One threshold for the whole tile, unless an exact count ends within it or a threshold would hide infinities.
  PF_HD void simplify(Shared& s, const Block& block) const {
    const Piece& piece = s.staged.piece;
    const int t = block.thread;
    if (t == 0 && ((piece.base | piece.out) & 15) != 0) atomic_or(&s.general, 1u);
    if (t >= kMostTasks) return;
    s.plain[t] = PlainTask{0, 0.0f, 0.0f};
    if (t >= piece.tasks) return;
    const Task& task = s.staged.tasks[t];
    const Span span = span_of(tables.tiles[block.index], piece.size);
    const int64_t first = piece.start + span.begin, last = piece.start + span.end - 1;
    float below = -1.0f;
    bool simple = (task.x & 15) == 0;
    if (task.keep == kKeepTop) {
      const bool equals_kept = task.low_index >= last;
      simple = simple && task.low < kInfBits && (equals_kept || task.low_index < first);
      if (!equals_kept) below = float_of(task.low);
      else if (task.low) below = float_of(task.low - 1u);
    }
    if (!simple) atomic_or(&s.general, 1u);
    s.plain[t] = PlainTask{task.x, task.weight, below};
  }

  // Exactly 0 counts as 1.
  PF_HD void add_shares(Shared& s, int thread) const {
    if (!kShares || thread >= kSets || thread >> s.staged.piece.tasks) return;
    float sum = 0.0f;
    for (int t = 0; t < kMostTasks; ++t)
      if (thread >> t & 1) sum = sum + s.plain[t].weight;
    const float divisor = sum == 0.0f ? 1.0f : sum;
    if (!(fabsf(divisor) >= 0x1p-30f && fabsf(divisor) <= 0x1p30f)) atomic_or(&s.general, 1u);
    s.shares[thread] = Share{divisor, 1.0f / divisor};
  }

  // What stays in registers while a thread walks through its tile.
  struct Constants {
    float weight[kMostTasks], below[kMostTasks];
    float scaling, divisor, zero_sign;
    int tasks;
  };

  PF_HD void merge(Shared& s, const Block& block) const {
    const Piece& piece = s.staged.piece;
    const Span span = span_of(tables.tiles[block.index], piece.size);
    uint32_t bad = 0, largest = 0;
    const int64_t rows_end = s.general ? span.begin : span.begin + (span.end - span.begin) / V * V;
    Constants c;
    PF_UNROLL
    for (int t = 0; t < kMostTasks; ++t) c.weight[t] = s.plain[t].weight, c.below[t] = s.plain[t].below;
    c.scaling = s.staged.rule.scaling, c.divisor = s.staged.rule.divisor;
    c.zero_sign = float(s.staged.rule.zero_sign), c.tasks = piece.tasks;
    PF_NO_UNROLL
    for (int64_t i = span.begin + int64_t(block.thread) * V; i < rows_end; i += kThreads * V) {
      if (merge_16_bytes(s, c, i)) continue;
      PF_NO_UNROLL
      for (int64_t k = i; k < i + V; ++k) one(s, k, bad, largest);
    }
    PF_NO_UNROLL
    for (int64_t i = rows_end + block.thread; i < span.end; i += kThreads) one(s, i, bad, largest);
    tell_nonfinite(tables.pieces[tables.tiles[block.index].piece], bad, largest, kDtype);
  }

  PF_HD void one(const Shared& s, int64_t i, uint32_t& bad, uint32_t& largest) const {
    merge_row<-1, 1, kElecting, false>(s.staged.piece, s.staged.tasks, s.staged.rule, i, bad, largest);
  }

  // False, with nothing written, when something is not finite.
  PF_HD bool merge_16_bytes(const Shared& s, const Constants& c, int64_t i) const {
    const Piece& piece = s.staged.piece;
    const int64_t bytes = i * itemsize(kDtype);
    Packed<kDtype> base, x[kMostTasks], out;
    base.load(at(piece.base, bytes));
    PF_UNROLL
    for (int t = 0; t < kMostTasks; ++t)
      if (t < c.tasks) x[t].load(at(s.plain[t].x, bytes));
    float infinite = 0.0f, largest = 0.0f;  // NaN once a total is not finite; the largest |result|
    bool tiny = false;                       // a sum so small that its division needs care
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
          if (kExact || t < c.tasks) {
            const float d = x[t].get(k, half) - b;
            weighted[t] = fabsf(d) <= c.below[t] ? 0.0f : d * c.weight[t];
            total = t ? total + weighted[t] : weighted[t];
          }
        }
        infinite = sticky(infinite, total);
        const float added = kElecting ? agreeing_mean(s, c, weighted, total, tiny)
                            : c.divisor == 1.0f ? total : total / c.divisor;
        if (kElecting) infinite = sticky(infinite, added);
        const float scaled = added * c.scaling;
        y[half] = scaled == 0.0f ? b : b + scaled;
        largest = fmaxf(largest, fabsf(y[half]));
        one_after_another();
      }
      out.set(k, y);
    }
    if (!(infinite == 0.0f) || tiny || !(largest < float_of(first_overflow(kDtype)))) return false;
    out.store(const_cast<uint8_t*>(at(piece.out, bytes)));
    return true;
  }

  // 0 where none agrees.
  PF_HD float agreeing_mean(const Shared& s, const Constants& c, const float (&weighted)[kMostTasks], float total,
                            bool& tiny) const {
    const float unit = float_of((bits_of(total) & 0x80000000u) | 0x3f800000u);
    const float sign = total == 0.0f ? c.zero_sign : unit;
    float sum = 0.0f, divisor = 0.0f;
    uint32_t who = 0;
    PF_UNROLL
    for (int t = 0; t < kMostTasks; ++t) {
      if (weighted[t] * sign > 0.0f) {
        sum = t ? sum + weighted[t] : weighted[t];
        if (kShares) who |= 1u << t;
        else divisor = divisor + c.weight[t];
      }
    }
    if (!kShares) return divisor == 0.0f ? sum : sum / divisor;
    tiny = tiny || (fabsf(sum) < 0x1p-90f && sum != 0.0f);
    const Share share = s.shares[who];
    return divide_by(sum, share.divisor, share.inverse);
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
