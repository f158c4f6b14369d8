// The steps of the algebra on vectors, for variant files: what of a task is kept, the groups that are summed, which of
// them is elected, division, rounding. Written once; the loops around them are in the _body.h files that include this.
#pragma once
#include "../delta_load.h"
#include "delta_merge.h"

namespace {

// |d| among the kept of an exact top-k: above the threshold, or equal to it and early enough.
PF_INLINE vm in_top(vi a, uint32_t threshold, int64_t last_index, int64_t first) {
  const int64_t room = last_index - first;  // lanes 0..room of this vector may take an equal
  if (room >= W - 1) return gt(a, splat_i(int32_t(threshold) - 1));
  const vm early = gt(splat_i(int32_t(room < 0 ? 0 : room + 1)), iota());
  return either(gt(a, splat_i(threshold)), both(eq(a, splat_i(threshold)), early));
}

// `view`: the words or probabilities of the elements, and `below` for kKeepRandom.
template <class AnyView>
PF_INLINE vm kept(const Task& task, const AnyView& view, vi a, int i, int64_t first) {
  switch (task.keep) {
    case kKeepAll:
      return no(none());
    case kKeepTop:
      return in_top(a, task.low, task.low_index, first);
    case kKeepBand:
      return both(in_top(a, task.low, task.low_index, first), no(in_top(a, task.high, task.high_index, first)));
    case kKeepNone:
      return none();
    case kKeepRandom:  // (word >> 8) 2^-24 < p, in whole numbers
      return gt(splat_i(view.below), (vi)(load_raw<vu>(view.words + i) >> 8));
    default: {
      const vf u = __builtin_convertvector((vi)(load_raw<vu>(view.words + i) >> 8), vf) * 0x1p-24f;
      return gt(load_raw<vf>(view.probability + i), u);
    }
  }
}

struct Sums {
  vf total = -vf{};                        // starts at -0, the neutral element of IEEE addition
  vf positive = -vf{}, negative = -vf{};   // sums (or extremes) of the agreeing, either way
  vf positive_divisor = vf{}, negative_divisor = vf{};
};

// e: the task's contribution, w: its weight, we: their product.
template <bool kElecting, bool kExtreme>
PF_INLINE void accumulate(Sums& s, const Rule& rule, vf e, vf w, vf we) {
  if (!kElecting) {
    if (!kExtreme) {
      s.total = s.total + we;
    } else {
      const vi a = abs_bits(we), best = abs_bits(s.total);
      s.total = select(rule.aggregate == kLargestLast ? no(gt(best, a)) : gt(a, best), we, s.total);
    }
    return;
  }
  vf v = rule.elect == kElectWeighted ? we : e;
  const vm up = gt(v, vf{}), down = gt(vf{}, v);
  if (rule.elect == kElectCount) v = only(up, splat(1.0f)) - only(down, splat(1.0f));
  s.total = s.total + v;
  if (kExtreme) {
    s.positive = select(both(up, gt(we, s.positive)), we, s.positive);
    s.negative = select(both(down, gt(s.negative, we)), we, s.negative);
    return;
  }
  s.positive = add_where(up, s.positive, we);
  s.negative = add_where(down, s.negative, we);
  if (rule.divide == kDivideConstant) return;
  const vf share = rule.divide == kDivideAgreeingCount ? splat(1.0f) : w;
  s.positive_divisor = add_where(up, s.positive_divisor, share);
  s.negative_divisor = add_where(down, s.negative_divisor, share);
}

struct Elected {
  vf sum, divisor;  // of the group that the sign elects; the divisor counts only where it is one of the agreeing
};

template <bool kElecting>
PF_INLINE Elected elected(const Sums& s, const Rule& rule) {
  if (!kElecting) return {s.total, vf{}};
  const vm above = gt(s.total, vf{}), below = gt(vf{}, s.total);
  const vm up = rule.zero_sign > 0 ? no(below) : above, down = rule.zero_sign < 0 ? no(above) : below;
  return {select(up, s.positive, select(down, s.negative, -vf{})),
          select(up, s.positive_divisor, s.negative_divisor)};
}

PF_INLINE vf divided(vf sum, vf divisor, const Rule& rule) {
  if (rule.divide != kDivideConstant) {
    if (rule.floor > 0.0f) divisor = select(gt(splat(rule.floor), divisor), splat(rule.floor), divisor);
    sum = divide_where(no(eq(divisor, vf{})), sum, divisor);
  } else if (rule.divisor != 1.0f) {
    sum = sum / rule.divisor;
  }
  return sum;
}

// The lower median of the T weighted contributions, by insertion into a sorted stack of vectors.
PF_INLINE vf median(vf* sorted, int tasks) { return sorted[(tasks - 1) / 2]; }

PF_INLINE void insert_sorted(vf* sorted, int have, vf v) {
  for (int j = 0; j < have; ++j) {
    const vm smaller = gt(sorted[j], v);
    const vf lower = select(smaller, v, sorted[j]);
    v = select(smaller, sorted[j], v);
    sorted[j] = lower;
  }
  sorted[have] = v;
}

// Rounds and stores; returns the size of what was rounded, for `first_overflow` to judge.
PF_INLINE vi store(void* out, int32_t dtype, int i, vf x) {
  const vf y = canonical(x);
  if (dtype == kF32) {
    memcpy((float*)out + i, &y, sizeof y);
  } else {
    const vh h = dtype == kBF16 ? narrow_32(round_to_bf16(y) >> 16) : to_f16(y);
    memcpy((uint16_t*)out + i, &h, sizeof h);
  }
  return abs_bits(y);
}

// Bits of the smallest |y| that rounds to infinity.
PF_INLINE int32_t first_overflow(int32_t dtype) {
  return dtype == kBF16 ? 0x7f7f8000 : dtype == kF16 ? 0x477ff000 : 0x7f800000;
}

// What padding makes of itself counts for nothing: 0 in all lanes but the first `count`.
PF_INLINE vi leading(vi v, int count) { return count >= W ? v : select(gt(splat_i(count), iota()), v, vi{}); }

PF_INLINE const void* padded_copy(float* row, const void* from, int64_t bytes) {
  memset(row, 0, kRow * 4);
  memcpy(row, from, bytes);
  return row;
}

// The smallest whole number m with m 2^-24 >= p; 0 for NaN.
PF_INLINE int32_t first_at_least(float p) {
  if (!(p > 0.0f)) return 0;
  return p > 1.0f ? 1 << 24 : int32_t(__builtin_ceilf(p * 0x1p24f));
}

PF_INLINE bool any_from(vi sizes, int32_t least) { return lanes(gt(sizes, splat_i(least - 1))) != 0; }

}  // namespace
