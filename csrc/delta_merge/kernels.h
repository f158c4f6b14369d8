// The fused merge for CUDA: the algebra of _body.h element by element, for rows of V neighbours and for single ones.
//
// Floor: each input read once, each output written once; T = 3 in bf16 moves 10 bytes an element.
// Shared by the kernels in kernels_plain.h and kernels_general.h. No contraction, no fast math: the CPU's bits.
#pragma once
#include "../device/load.h"
#include "../device/philox.h"
#include "delta_merge.h"

namespace peta {

static constexpr int kMergeThreads = 256;
static constexpr int64_t kMergeTile = 16384;  // elements that a block merges, a multiple of kBlock
static constexpr int kStagedTasks = 32;       // task records that a block keeps in shared memory; more stay where they are

struct Tile {
  int32_t piece, index;
};

// Everything in device memory.
struct MergeTables {
  Piece* pieces;
  const Task* tasks;
  const Rule* rules;
  const Tile* tiles;
};

struct Span {  // of a tile within its piece
  int64_t begin, end;
};

PF_HD Span span_of(const Tile& tile, int64_t size) {
  const int64_t begin = tile.index * kMergeTile;
  return {begin, smaller(begin + kMergeTile, size)};
}

// ---------------------------------------------------------------- rows of V elements

template <int V>
struct Raw {  // V elements as they lie in memory
  Words4 words[V <= 4 ? 1 : V / 4];
};

// Whether rows of V elements from p on can be loaded at once; single elements always can.
template <int V>
PF_HD bool rows_aligned(uint64_t p, int32_t dtype) {
  return V == 1 || (p & uint64_t(V * itemsize(dtype) < 16 ? V * itemsize(dtype) - 1 : 15)) == 0;
}

// kDtype: the dtype, where it is known when this is compiled, else -1.
template <int32_t kDtype, int V>
PF_HD void load_raw_row(Raw<V>& raw, const uint8_t* p, int32_t given) {
  const int32_t dtype = kDtype < 0 ? given : kDtype;
  if constexpr (V == 1) {
    raw.words[0].w[0] = dtype == kF32 ? load_small<uint32_t>(p) : load_small<uint16_t>(p);
  } else if (dtype == kF32) {
    PF_UNROLL
    for (int k = 0; k < V / 4; ++k) raw.words[k] = load_16(p + 16 * k);
  } else if constexpr (V == 8) {
    raw.words[0] = load_16(p);
  } else {
    raw.words[0].w[0] = load_small<uint32_t>(p), raw.words[0].w[1] = load_small<uint32_t>(p + 4);
  }
}

template <int32_t kDtype, int V>
PF_HD void widen_row(float (&out)[V], const Raw<V>& raw, int32_t given) {
  const int32_t dtype = kDtype < 0 ? given : kDtype;
  PF_UNROLL
  for (int j = 0; j < V; ++j) {
    if (dtype == kF32) {
      out[j] = float_of(raw.words[j / 4].w[j % 4]);
    } else {
      const uint32_t word = raw.words[j / 8].w[j / 2 % 4];
      const uint16_t h = uint16_t(j % 2 ? word >> 16 : word);
      if (dtype == kBF16) {
        out[j] = float_of(uint32_t(h) << 16);
      } else {
        out[j] = widen_f16(h);
        if (out[j] != out[j]) out[j] = half_bits_to_float(h);
      }
    }
  }
}

template <int32_t kDtype, int V>
PF_HD void load_row(float (&out)[V], uint64_t p, int32_t dtype, int64_t i) {
  Raw<V> raw;
  load_raw_row<kDtype, V>(raw, at(p, i * itemsize(kDtype < 0 ? dtype : kDtype)), dtype);
  widen_row<kDtype, V>(out, raw, dtype);
}

// Masks and weights; `flat` is the index within the tensor, for masks of bits.
template <int V>
PF_HD void load_any_row(float (&out)[V], uint64_t p, int32_t dtype, int64_t i, int64_t flat) {
  if (dtype == kBits) {
    const uint8_t* b = at(p, flat >> 3);
    const int offset = int(flat & 7);
    uint32_t set = b[0];
    if (offset + V > 8) set |= uint32_t(b[1]) << 8;
    PF_UNROLL
    for (int j = 0; j < V; ++j) out[j] = set >> (offset + j) & 1u ? 1.0f : 0.0f;
  } else if (dtype == kBytes) {
    const uint8_t* b = at(p, i);
    uint32_t four = b[0];
    PF_UNROLL
    for (int j = 0; j < V; ++j) {
      if (V % 4 == 0 && j % 4 == 0) four = load_small<uint32_t>(b + j);
      out[j] = four >> (8 * (j % 4)) & 255u ? 1.0f : 0.0f;
    }
  } else {
    load_row<-1, V>(out, p, dtype, i);
  }
}

// ---------------------------------------------------------------- sparsify, mask, prescale, weight

PF_HD bool in_top(uint32_t a, uint32_t threshold, int64_t last_index, int64_t index) {
  return a > threshold || (a == threshold && index <= last_index);
}

// The smallest whole number m with m 2^-24 >= p; 0 for NaN.
PF_HD int32_t first_at_least(float p) {
  if (!(p > 0.0f)) return 0;
  if (p > 1.0f) return 1 << 24;
  const float scaled = p * 16777216.0f;
  const int32_t floor = int32_t(scaled);
  return floor + (float(floor) < scaled ? 1 : 0);
}

// d where it is kept, else 0. i: the row's first element within the piece; flat: within the tensor.
template <int V>
PF_HD void sparsify(float (&e)[V], const Task& task, int64_t i, int64_t flat) {
  if (task.keep == kKeepTop || task.keep == kKeepBand) {
    PF_UNROLL
    for (int j = 0; j < V; ++j) {
      const uint32_t a = bits_of(e[j]) & kAbsMask;
      bool kept = in_top(a, task.low, task.low_index, flat + j);
      if (task.keep == kKeepBand) kept = kept && !in_top(a, task.high, task.high_index, flat + j);
      if (!kept) e[j] = 0.0f;
    }
  } else if (task.keep == kKeepNone) {
    PF_UNROLL
    for (int j = 0; j < V; ++j) e[j] = 0.0f;
  } else if (task.keep != kKeepAll) {
    uint32_t words[V];
    philox_words<V>(words, task.key, uint64_t(flat));
    const bool shared = task.keep == kKeepRandom;
    const int32_t below = shared ? first_at_least(task.p) : 0;
    PF_UNROLL
    for (int j = 0; j < V; ++j) {
      const int32_t number = int32_t(words[j] >> 8);
      bool kept = number < below;
      if (!shared)
        kept = float_of(load_small<uint32_t>(at(task.probability, (i + j) * 4))) > float(number) * 5.9604644775390625e-08f;
      if (!kept) e[j] = 0.0f;
    }
  }
}

// The largest |x| of a row as bits: above all finite ones if any is not.
template <int V>
PF_HD void largest_of(uint32_t& largest, const float (&x)[V]) {
  PF_UNROLL
  for (int j = 0; j < V; ++j) {
    const uint32_t a = bits_of(x[j]) & kAbsMask;
    largest = a > largest ? a : largest;
  }
}

// x becomes the task vector d, then e: sparsified, masked, prescaled. `bad` collects the largest |d| and |mask|.
template <int V>
PF_HD void contribution(float (&x)[V], const float (&base)[V], const Task& task, int64_t i, int64_t flat, uint32_t& bad) {
  if (!task.is_delta) {
    PF_UNROLL
    for (int j = 0; j < V; ++j) x[j] = subtract(x[j], base[j]);
  }
  largest_of<V>(bad, x);
  if (task.keep != kKeepAll) sparsify<V>(x, task, i, flat);
  if (task.mask) {
    float m[V];
    load_any_row<V>(m, task.mask, task.mask_dtype, i, flat);
    largest_of<V>(bad, m);
    PF_UNROLL
    for (int j = 0; j < V; ++j) x[j] = x[j] * m[j];
  }
  if (task.by_probability) {
    PF_UNROLL
    for (int j = 0; j < V; ++j)
      x[j] = x[j] * (1.0f / float_of(load_small<uint32_t>(at(task.probability, (i + j) * 4))));
  }
  if (task.prescale != 1.0f) {
    PF_UNROLL
    for (int j = 0; j < V; ++j) x[j] = x[j] * task.prescale;
  }
}

template <int V>
PF_HD void weights_of(float (&w)[V], const Task& task, int64_t i, uint32_t& bad) {
  if (task.weights) {
    load_row<-1, V>(w, task.weights, task.weights_dtype, i);
    largest_of<V>(bad, w);
    PF_UNROLL
    for (int j = 0; j < V; ++j) w[j] = task.weight * w[j];
  } else {
    PF_UNROLL
    for (int j = 0; j < V; ++j) w[j] = task.weight;
  }
}

// ---------------------------------------------------------------- elect, aggregate, normalize

template <bool kElecting>
struct Sums {
  float total = -0.0f;  // the neutral element of IEEE addition
};

template <>
struct Sums<true> {
  float total = -0.0f;
  float positive = -0.0f, negative = -0.0f;  // sums (or extremes) of the agreeing, either way
  float positive_divisor = 0.0f, negative_divisor = 0.0f;
};

// e: the task's contribution, w: its weight.
template <bool kElecting, bool kExtreme>
PF_HD void accumulate(Sums<kElecting>& s, const Rule& rule, float e, float w) {
  const float we = e * w;
  if constexpr (!kElecting) {
    if (!kExtreme) {
      s.total = s.total + we;
    } else {
      const uint32_t a = bits_of(we) & kAbsMask, best = bits_of(s.total) & kAbsMask;
      if (rule.aggregate == kLargestLast ? !(best > a) : a > best) s.total = we;
    }
  } else {
    float v = rule.elect == kElectWeighted ? we : e;
    const bool up = v > 0.0f, down = v < 0.0f;
    if (rule.elect == kElectCount) v = (up ? 1.0f : 0.0f) - (down ? 1.0f : 0.0f);
    s.total = s.total + v;
    if (kExtreme) {
      if (up && we > s.positive) s.positive = we;
      if (down && s.negative > we) s.negative = we;
      return;
    }
    if (up) s.positive = s.positive + we;
    if (down) s.negative = s.negative + we;
    if (rule.divide == kDivideConstant) return;
    const float share = rule.divide == kDivideAgreeingCount ? 1.0f : w;
    if (up) s.positive_divisor = s.positive_divisor + share;
    if (down) s.negative_divisor = s.negative_divisor + share;
  }
}

PF_HD float divided(float sum, float divisor, const Rule& rule) {
  if (rule.divide != kDivideConstant) {
    if (rule.floor > 0.0f && rule.floor > divisor) divisor = rule.floor;
    return divisor == 0.0f ? sum : sum / divisor;
  }
  return rule.divisor == 1.0f ? sum : sum / rule.divisor;
}

// What is added to the base, before scaling.
template <bool kElecting>
PF_HD float elected(const Sums<kElecting>& s, const Rule& rule) {
  if constexpr (!kElecting) {
    return divided(s.total, 0.0f, rule);
  } else {
    const bool above = s.total > 0.0f, below = s.total < 0.0f;
    const bool up = rule.zero_sign > 0 ? !below : above, down = rule.zero_sign < 0 ? !above : below;
    return divided(up ? s.positive : down ? s.negative : -0.0f, up ? s.positive_divisor : s.negative_divisor, rule);
  }
}

PF_HD float with_base(float y, float base, const Rule& rule) {
  if (rule.scaling != 1.0f) y = y * rule.scaling;
  return rule.base_kind == kBaseZero ? y : y == 0.0f ? base : base + y;
}

// Elements [i, i + V) of a piece, merged and stored, by any rule but the median. kDtype: of base, models and output,
// or -1. bad: the largest |input|, largest: the largest |result|, as bits.
template <int32_t kDtype, int V, bool kElecting, bool kExtreme>
PF_HD void merge_row(const Piece& piece, const Task* tasks, const Rule& rule, int64_t i, uint32_t& bad, uint32_t& largest) {
  const int64_t flat = piece.start + i;
  float base[V];
  Sums<kElecting> sums[V];
  if (rule.base_kind == kBaseTensor) {
    load_row<kDtype, V>(base, piece.base, piece.base_dtype, i);
  } else {
    PF_UNROLL
    for (int j = 0; j < V; ++j) base[j] = rule.base_kind == kBaseOne ? 1.0f : 0.0f;
  }
  Raw<V> next;
  if (piece.tasks) {
    const Task& first = tasks[0];
    load_raw_row<kDtype, V>(next, at(first.x, i * itemsize(kDtype < 0 ? first.dtype : kDtype)), first.dtype);
  }
  PF_NO_UNROLL
  for (int t = 0; t < piece.tasks; ++t) {
    const Task& task = tasks[t];
    float x[V], w[V];
    widen_row<kDtype, V>(x, next, task.dtype);
    if (t + 1 < piece.tasks) {  // under way while this one is worked on
      const Task& other = tasks[t + 1];
      load_raw_row<kDtype, V>(next, at(other.x, i * itemsize(kDtype < 0 ? other.dtype : kDtype)), other.dtype);
    }
    contribution<V>(x, base, task, i, flat, bad);
    weights_of<V>(w, task, i, bad);
    PF_UNROLL
    for (int j = 0; j < V; ++j) accumulate<kElecting, kExtreme>(sums[j], rule, x[j], w[j]);
  }
  if (kElecting && rule.elect == kElectGiven) {
    float given[V];
    load_row<-1, V>(given, piece.sign, piece.sign_dtype, i);
    largest_of<V>(bad, given);
    PF_UNROLL
    for (int j = 0; j < V; ++j) sums[j].total = given[j];
  }
  if (rule.base_kind == kBaseTensor) largest_of<V>(bad, base);
  float y[V];
  uint32_t most = 0;
  PF_UNROLL
  for (int j = 0; j < V; ++j) {
    y[j] = with_base(elected<kElecting>(sums[j], rule), base[j], rule);
    const uint32_t a = bits_of(y[j]) & kAbsMask;
    most = a > most ? a : most;
  }
  largest = most > largest ? most : largest;
  const int32_t dtype = kDtype < 0 ? piece.out_dtype : kDtype;
  uint8_t* const out = const_cast<uint8_t*>(at(piece.out, i * itemsize(dtype)));
  if (V >= 4 && most <= kInfBits) {  // no NaN
    if (dtype == kF32) {
      PF_UNROLL
      for (int k = 0; k < V / 4; ++k) {
        Words4 four;
        PF_UNROLL
        for (int j = 0; j < 4; ++j) four.w[j] = bits_of(y[k * 4 + j]);
        store_16(out + 16 * k, four);
      }
      return;
    }
    if (kDtype != kF32 && V == 8 && dtype == kDtype) {
      Packed<kDtype == kF16 ? kF16 : kBF16> packed;
      PF_UNROLL
      for (int k = 0; k < 4; ++k) {
        const float pair[2] = {y[(2 * k) % V], y[(2 * k + 1) % V]};
        packed.set(k, pair);
      }
      packed.store(out);
      return;
    }
  }
  PF_UNROLL
  for (int j = 0; j < V; ++j) store_element(out + j * itemsize(dtype), dtype, y[j]);
}

// What a thread has seen of its piece that is not finite goes into the piece's record.
PF_HD void tell_nonfinite(Piece& piece, uint32_t bad, uint32_t largest, int32_t out_dtype) {
  const uint32_t flags = (bad >= kInfBits ? 1u : 0u) | (largest >= first_overflow(out_dtype) ? 2u : 0u);
  if (flags) atomic_or(&piece.nonfinite, flags);
}

// The block's piece, rule and, where they fit, task records, in shared memory.
struct StagedPiece {
  Piece piece;
  Rule rule;
  Task tasks[kStagedTasks];
  uint32_t one_by_one;  // an address allows no rows
};

PF_HD Piece* stage(StagedPiece& s, const MergeTables& tables, const Block& block, int threads) {
  Piece* const piece = tables.pieces + tables.tiles[block.index].piece;
  if (block.thread == 0) s.piece = *piece, s.rule = tables.rules[piece->rule], s.one_by_one = 0;
  if (piece->tasks <= kStagedTasks)
    for (int t = block.thread; t < piece->tasks; t += threads) s.tasks[t] = tables.tasks[piece->first_task + t];
  return piece;
}

// After `stage`: whether rows of V elements can be loaded and stored at once.
template <int V>
PF_HD void look_at_addresses(StagedPiece& s, const Task* tasks, const Block& block, int threads) {
  const Piece& p = s.piece;
  bool fits = true;
  if (block.thread == 0) {
    if (s.rule.base_kind == kBaseTensor) fits = rows_aligned<V>(p.base, p.base_dtype);
    fits = fits && rows_aligned<V>(p.out, p.out_dtype) && (!p.sign || rows_aligned<V>(p.sign, p.sign_dtype));
  }
  for (int t = block.thread; t < p.tasks; t += threads) {
    const Task& k = tasks[t];
    fits = fits && rows_aligned<V>(k.x, k.dtype);
    fits = fits && (!k.mask || k.mask_dtype > kBF16 || rows_aligned<V>(k.mask, k.mask_dtype));
    fits = fits && (!k.weights || rows_aligned<V>(k.weights, k.weights_dtype));
  }
  if (!fits) atomic_or(&s.one_by_one, 1u);
}

PF_HD const Task* tasks_of(const StagedPiece& s, const MergeTables& tables) {
  return s.piece.tasks <= kStagedTasks ? s.tasks : tables.tasks + s.piece.first_task;
}

}  // namespace peta
