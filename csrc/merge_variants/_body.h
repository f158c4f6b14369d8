// The loops, once. A variant file defines PETA_VARIANT and includes this.
#include "../delta_merge/algebra.h"
#include "../philox.h"
#include "merge_variants.h"

namespace {

// Below this size of base and contributions, with weights as `is_tame` wants them, nothing can overflow.
static constexpr int32_t kTameBits = (127 + 50) << 23;
static constexpr float kTameFactor = 0x1p20f;
static constexpr int kAhead = 2 * kChunk;  // elements

PF_INLINE vf signed_by(vf x, vf sign) {  // x, negated where `sign` has its sign bit set
#if defined(__AVX512F__)
  return (vf)_mm512_ternarylogic_epi32((__m512i)sign, _mm512_set1_epi32(INT32_MIN), (__m512i)x, 0x6a);
#else
  return (vf)((vi)x ^ ((vi)sign & INT32_MIN));
#endif
}

PF_INLINE vf quotient_where(vm m, vf a, vf b) {  // 0 elsewhere
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_div_ps(m, (__m512)a, (__m512)b);
#else
  return only(m, a / select(m, b, splat(1.0f)));
#endif
}

// ---------------------------------------------------------------------------------------------------- staging

}  // namespace

// Elements [begin, begin + n) of a group. Rows hold them in their order or, in pairs, 2 W at a time with the even ones
// first: bf16 comes and goes so without shuffles.
struct Chunk {
  const VariantGroup* group;
  int64_t begin, first;  // within the group, within the tensor
  int n, padded;
  bool pairs, base_bad, base_tame;
};

namespace {

PF_INLINE void widen_mask(float* out, const void* p, int32_t dtype, int64_t first, int n, int padded) {
  for (int i = n; i < padded; ++i) out[i] = 0.0f;
  if (dtype == kBits) {
    for (int i = 0; i < n; ++i) out[i] = float(((const uint8_t*)p)[(first + i) >> 3] >> ((first + i) & 7) & 1);
  } else if (dtype == kBytes) {
    for (int i = 0; i < n; ++i) out[i] = ((const uint8_t*)p)[first + i] ? 1.0f : 0.0f;
  } else {
    for (int i = 0; i < n; ++i) out[i] = load_one((uint64_t)p, dtype, first + i);
  }
}

PF_INLINE bool is_random(const Task& t) { return t.keep == kKeepRandom || t.keep == kKeepRandomPerElement; }

// One random stream a key: terms that differ in their probability share it.
PF_INLINE const uint32_t* words_of(const Chunk& c, const Task* tasks, int t, const VariantScratch& scratch) {
  for (int earlier = 0; earlier < t; ++earlier)
    if (scratch.terms[earlier].used && is_random(tasks[earlier]) && tasks[earlier].key == tasks[t].key)
      return scratch.terms[earlier].words;
  const uint64_t offset = uint64_t(c.first) % 4;
  uint32_t* words = (uint32_t*)scratch.words + int64_t(t) * kRow;
  philox_words(words, tasks[t].key, uint64_t(c.first) - offset, c.n + int(offset));
  return words + offset;
}

// |d| above `below` is kept, where no exact count ends within the chunk.
PF_INLINE bool one_threshold(const Chunk& c, const Task& task, int32_t& below) {
  if (task.keep == kKeepAll) return below = -1, true;
  if (task.keep == kKeepNone) return below = int32_t(kAbsMask), true;
  if (task.keep != kKeepTop) return false;
  const bool equals_kept = task.low_index >= c.first + c.n - 1;
  below = int32_t(task.low) - (equals_kept ? 1 : 0);
  return equals_kept || task.low_index < c.first;
}

// Points the term at its elements; what is stored in another form is staged in scratch.
PF_INLINE void open_term(const Chunk& c, const Task* tasks, int t, const VariantScratch& scratch) {
  const Task& task = tasks[t];
  TermView& v = scratch.terms[t];
  const int64_t row = int64_t(t) * kRow;
  v.x = (const uint8_t*)task.x + c.begin * itemsize(task.dtype);
  if (c.padded != c.n) v.x = padded_copy(scratch.input + row, v.x, c.n * itemsize(task.dtype));
  v.mask = v.probability = nullptr;
  v.words = nullptr;
  if (is_random(task)) v.words = words_of(c, tasks, t, scratch), v.below = first_at_least(task.p);
  if (task.keep == kKeepRandomPerElement) {
    v.probability = (const float*)task.probability + c.begin;
    if (c.padded != c.n) {
      float* copy = scratch.probability + row;
      for (int i = c.n; i < c.padded; ++i) copy[i] = 1.0f;  // a divisor, in the padding too
      memcpy(copy, v.probability, c.n * 4);
      v.probability = copy;
    }
  }
  if (task.mask) {
    float* mask = scratch.mask + row;
    widen_mask(mask, (const void*)task.mask, task.mask_dtype, task.mask_dtype == kBits ? c.first : c.begin, c.n,
               c.padded);
    v.mask = mask;
  }
}

PF_INLINE void stage_any(const Chunk& c, const Task& task, const TermView& given, const float* base, TermView& result) {
  const TermView v = given;
  vi sizes{}, sizes_kept{};
  for (int i = 0; i < c.padded; i += W) {
    const vf x = load(v.x, task.dtype, i);
    const vf d = task.is_delta ? x : x - load_raw<vf>(base + i);
    const vi a = abs_bits(d);
    sizes = max_i(sizes, a);
    vf e = only(kept(task, v, a, i, c.first + i), d);
    if (v.mask) {
      const vf m = load_raw<vf>(v.mask + i);
      sizes = max_i(sizes, abs_bits(m));
      e = e * m;
    }
    if (task.by_probability) e = e * (splat(1.0f) / load_raw<vf>(v.probability + i));
    if (task.prescale != 1.0f) e = e * task.prescale;
    sizes_kept = max_i(sizes_kept, abs_bits(e));
    memcpy(v.row + i, &e, sizeof e);
  }
  result.bad = any_from(sizes, kInfBits);
  result.tame = !result.bad && !any_from(sizes_kept, kTameBits);
}

PF_INLINE void stage_pairs(const Chunk& c, int32_t below, const TermView& given, const float* base, TermView& result) {
  const TermView v = given;
  vi sizes{};
  for (int i = 0; i < c.padded; i += 2 * W) {
    vf x[2];
    prefetch((const uint16_t*)v.x + i + kAhead);  // arrives while the variants are made
    load_bf16_pair((const uint16_t*)v.x + i, x[0], x[1]);
    for (int h = 0; h < 2; ++h) {
      const vf d = x[h] - load_raw<vf>(base + i + h * W);
      const vi a = abs_bits(d);
      sizes = max_i(sizes, a);
      const vf e = only(gt(a, splat_i(below)), d);
      memcpy(v.row + i + h * W, &e, sizeof e);
    }
  }
  result.bad = any_from(sizes, kInfBits);
  result.tame = !any_from(sizes, kTameBits);
}

PF_INLINE void stage_base(Chunk& c, const VariantScratch& scratch) {
  const VariantGroup& g = *c.group;
  float* row = scratch.base;
  vi sizes{};
  c.base_bad = false, c.base_tame = true;
  if (g.base_kind != kBaseTensor) {
    for (int i = 0; i < c.padded; ++i) row[i] = g.base_kind == kBaseOne ? 1.0f : 0.0f;
    return;
  }
  const void* p = (const uint8_t*)g.base + c.begin * itemsize(g.base_dtype);
  if (c.padded != c.n) p = padded_copy(scratch.base_input, p, c.n * itemsize(g.base_dtype));
  for (int i = 0; i < c.padded; i += 2 * W) {
    vf b[2];
    if (c.pairs) prefetch((const uint16_t*)p + i + kAhead), load_bf16_pair((const uint16_t*)p + i, b[0], b[1]);
    else b[0] = load(p, g.base_dtype, i), b[1] = load(p, g.base_dtype, i + W);
    memcpy(row + i, b, sizeof b);
    sizes = max_i(sizes, max_i(abs_bits(b[0]), abs_bits(b[1])));
  }
  c.base_bad = any_from(sizes, kInfBits), c.base_tame = !any_from(sizes, kTameBits);
}

PF_INLINE bool in_pairs(const Chunk& c, const Task* tasks, const Variant* variants, const VariantScratch& scratch) {
  const VariantGroup& g = *c.group;
  bool pairs = g.base_kind == kBaseTensor && g.base_dtype == kBF16;
  int32_t below;
  for (int t = 0; t < g.terms; ++t) {
    const Task& k = tasks[t];
    if (!scratch.terms[t].used) continue;
    pairs = pairs && k.dtype == kBF16 && !k.is_delta && !k.mask && k.prescale == 1.0f && one_threshold(c, k, below);
  }
  for (int v = 0; v < g.variants; ++v) pairs = pairs && variants[v].out_dtype == kBF16;
  return pairs;
}

PF_INLINE void stage(Chunk& c, const Task* tasks, const VariantScratch& scratch) {
  stage_base(c, scratch);
  for (int t = 0; t < c.group->terms; ++t) {
    TermView& v = scratch.terms[t];
    if (!v.used) continue;
    open_term(c, tasks, t, scratch);
    v.row = scratch.rows + int64_t(t) * kRow;
    int32_t below = 0;
    if (c.pairs && one_threshold(c, tasks[t], below)) stage_pairs(c, below, v, scratch.base, v);
    else stage_any(c, tasks[t], v, scratch.base, v);
  }
}

// --------------------------------------------------------------------------------------------- what is merged

template <int kTasks>
struct WeightedRows {
  const float* rows[kTasks];
  vf weights[kTasks];
  float constant;

  PF_INLINE WeightedRows of(const Use* uses, int, const Rule& rule, const VariantScratch& scratch) {
    WeightedRows a;
    for (int t = 0; t < kTasks; ++t) a.rows[t] = scratch.terms[uses[t].term].row, a.weights[t] = splat(uses[t].weight);
    a.constant = rule.divisor;
    return a;
  }
};

// The mean (or, with a constant divisor, the sum) of those that agree with the sign of the weighted sum, 0 where there
// are none. All weights are positive and everything is tame. kPlus: a zero sum counts as plus, else it elects nothing.
template <int kTasks, bool kPlus, bool kMean>
struct Agreeing : WeightedRows<kTasks> {
  PF_INLINE vf mean(const WeightedRows<kTasks>& a, int i) {
    vf weighted[kTasks], total, sum{}, divisor{};
    for (int t = 0; t < kTasks; ++t) {
      weighted[t] = load_raw<vf>(a.rows[t] + i) * a.weights[t];
      total = t ? total + weighted[t] : weighted[t];
    }
    for (int t = 0; t < kTasks; ++t) {
      const vf along = signed_by(weighted[t], total);
      const vm agrees = gt(along, vf{});
      sum = t ? add_where(agrees, sum, along) : only(agrees, along);
      if (kMean) divisor = t ? add_where(agrees, divisor, a.weights[t]) : only(agrees, a.weights[t]);
    }
    const vm elected = kPlus ? gt(sum, vf{}) : no(eq(total, vf{}));
    if (kMean) {
      sum = quotient_where(elected, sum, divisor);
    } else {
      sum = only(elected, sum);
      if (a.constant != 1.0f) sum = sum / a.constant;
    }
    return signed_by(sum, total);
  }
};

template <int kTasks>
struct PlainSum : WeightedRows<kTasks> {
  PF_INLINE vf mean(const WeightedRows<kTasks>& a, int i) {
    vf total = -vf{};
    for (int t = 0; t < kTasks; ++t) total = total + load_raw<vf>(a.rows[t] + i) * a.weights[t];
    return a.constant != 1.0f ? total / a.constant : total;
  }
};

template <>
struct PlainSum<0> {
  const Use* uses;
  int num_uses;
  const TermView* terms;
  float constant;

  PF_INLINE PlainSum of(const Use* uses, int num_uses, const Rule& rule, const VariantScratch& scratch) {
    return {uses, num_uses, scratch.terms, rule.divisor};
  }

  PF_INLINE vf mean(const PlainSum& a, int i) {
    vf total = -vf{};
    for (int t = 0; t < a.num_uses; ++t)
      total = total + load_raw<vf>(a.terms[a.uses[t].term].row + i) * a.uses[t].weight;
    return a.constant != 1.0f ? total / a.constant : total;
  }
};

template <class Sum>
void find_means(const Chunk& c, const Use* uses, int num_uses, const Rule& rule, const VariantScratch& scratch) {
  const auto sum = Sum::of(uses, num_uses, rule, scratch);
  float* const means = scratch.means;
  const int n = c.padded;
  for (int i = 0; i < n; i += W) {
    const vf mean = Sum::mean(sum, i);
    memcpy(means + i, &mean, sizeof mean);
  }
}

PF_INLINE void store_pair(uint16_t* out, vu pair, bool stream) {
#if defined(__AVX512F__)
  if (stream) return _mm512_stream_si512((__m512i*)out, (__m512i)pair);
#else
  (void)stream;
#endif
  memcpy(out, &pair, sizeof pair);
}

// From contributions to bf16 in one loop, so that stores come evenly: in bursts they would fill what buffers them.
template <class Sum, bool kScaled>
void make_pairs(const Chunk& c, const Use* uses, int num_uses, const Rule& rule, const VariantScratch& scratch,
                uint16_t* out, bool stream) {
  const auto sum = Sum::of(uses, num_uses, rule, scratch);
  const vf scaling = splat(rule.scaling);
  const float* const bases = scratch.base;
  const int n = c.padded;
  for (int i = 0; i < n; i += 2 * W) {
    vf y[2];
    for (int h = 0; h < 2; ++h) {
      vf mean = Sum::mean(sum, i + h * W);
      if (kScaled) mean = mean * scaling;
      y[h] = add_where(no(eq(mean, vf{})), load_raw<vf>(bases + i + h * W), mean);
    }
    store_pair(out + i, bf16_pair(y[0], y[1]), stream);
  }
}

// Every rule of the algebra.
template <bool kElecting, bool kExtreme>
void any_rule(const Chunk& c, const Use* uses, int num_uses, const Rule& rule, const VariantScratch& scratch) {
  vf* sorted = (vf*)scratch.sorted;
  const bool by_median = !kElecting && rule.aggregate == kMedian;
  for (int i = 0; i < c.padded; i += W) {
    Sums s;
    for (int t = 0; t < num_uses; ++t) {
      const vf e = load_raw<vf>(scratch.terms[uses[t].term].row + i), w = splat(uses[t].weight);
      if (by_median) insert_sorted(sorted, t, e * w);
      else accumulate<kElecting, kExtreme>(s, rule, e, w, e * w);
    }
    if (by_median) s.total = median(sorted, num_uses);
    const Elected e = elected<kElecting>(s, rule);
    const vf mean = divided(e.sum, e.divisor, rule);
    memcpy(scratch.means + i, &mean, sizeof mean);
  }
}

// ------------------------------------------------------------------------------------------------- each variant

PF_INLINE bool small(float factor) { return factor <= kTameFactor && factor >= -kTameFactor; }
PF_INLINE bool no_tiny_divisor(float d) { return d >= 1.0f / kTameFactor || d <= -1.0f / kTameFactor; }

PF_INLINE bool same_means(const Variant& a, const Variant& b, const Use* uses, const Rule* rules) {
  const Rule &p = rules[a.rule], &q = rules[b.rule];
  if (a.uses != b.uses || p.elect != q.elect || p.zero_sign != q.zero_sign || p.aggregate != q.aggregate ||
      p.divide != q.divide || p.divisor != q.divisor || p.floor != q.floor)
    return false;
  for (int t = 0; t < a.uses; ++t) {
    const Use &u = uses[a.first_use + t], &w = uses[b.first_use + t];
    if (u.term != w.term || u.weight != w.weight) return false;
  }
  return true;
}

template <class Sum>
PF_INLINE void take(Way& way, const Rule& rule) {
  way.tame = find_means<Sum>;
  way.pairs = rule.scaling != 1.0f ? make_pairs<Sum, true> : make_pairs<Sum, false>;
}

template <bool kPlus, bool kMean>
void take_agreeing(Way& way, int tasks, const Rule& rule) {
  switch (tasks) {
    case 1: return take<Agreeing<1, kPlus, kMean>>(way, rule);
    case 2: return take<Agreeing<2, kPlus, kMean>>(way, rule);
    case 3: return take<Agreeing<3, kPlus, kMean>>(way, rule);
    case 4: return take<Agreeing<4, kPlus, kMean>>(way, rule);
  }
}

void take_sum(Way& way, int tasks, const Rule& rule) {
  switch (tasks) {
    case 2: take<PlainSum<2>>(way, rule); break;
    case 3: take<PlainSum<3>>(way, rule); break;
    case 4: take<PlainSum<4>>(way, rule); break;
    default: take<PlainSum<0>>(way, rule);
  }
  way.any = way.tame;
}

Way way_of(const Variant& v, const Use* all_uses, const Rule& rule) {
  const Use* uses = all_uses + v.first_use;
  bool positive = true;
  Way way{};
  way.is_tame = small(rule.scaling) && no_tiny_divisor(rule.divisor) && v.uses < 1024;
  for (int t = 0; t < v.uses; ++t) {
    way.is_tame = way.is_tame && small(uses[t].weight);
    positive = positive && uses[t].weight > 0.0f;
  }
  const bool extreme = rule.aggregate == kMax || rule.aggregate == kLargestFirst || rule.aggregate == kLargestLast;
  if (rule.elect == kElectNone) way.any = extreme ? any_rule<false, true> : any_rule<false, false>;
  else way.any = extreme ? any_rule<true, true> : any_rule<true, false>;
  way.tame = way.any;
  if (rule.elect == kElectNone && rule.aggregate == kSum) take_sum(way, v.uses, rule);
  if (positive && rule.elect == kElectWeighted && rule.aggregate == kSum && rule.floor == 0.0f &&
      rule.zero_sign >= 0 && rule.divide != kDivideAgreeingCount) {
    const bool mean = rule.divide == kDivideAgreeingWeight;
    if (rule.zero_sign) (mean ? take_agreeing<true, true> : take_agreeing<true, false>)(way, v.uses, rule);
    else (mean ? take_agreeing<false, true> : take_agreeing<false, false>)(way, v.uses, rule);
  }
  if (rule.base_kind != kBaseTensor) way.tame = way.any;  // where there is no base, zeros keep their signs
  return way;
}

PF_INLINE vf finished(const Chunk& c, const Rule& rule, const VariantScratch& scratch, int i) {
  vf y = load_raw<vf>(scratch.means + i);
  if (rule.scaling != 1.0f) y = y * rule.scaling;
  if (c.group->base_kind == kBaseZero) return y;
  const vf base = load_raw<vf>(scratch.base + i);
  return add_where(no(eq(y, vf{})), base, y);
}

// Everything finite and far from overflow, bf16 in pairs: only rounding is left.
template <bool kScaled>
void finish_tame_pairs(const Chunk& c, const Rule& rule, const VariantScratch& scratch, uint16_t* out, bool stream) {
  const vf scaling = splat(rule.scaling);
  const float *means = scratch.means, *bases = scratch.base;
  const int n = c.padded;
  for (int i = 0; i < n; i += 2 * W) {
    vf y[2];
    for (int h = 0; h < 2; ++h) {
      vf mean = load_raw<vf>(means + i + h * W);
      if (kScaled) mean = mean * scaling;
      y[h] = add_where(no(eq(mean, vf{})), load_raw<vf>(bases + i + h * W), mean);
    }
    store_pair(out + i, bf16_pair(y[0], y[1]), stream);
  }
}

// Returns whether something overflowed. What padding makes of itself counts for nothing.
PF_INLINE bool finish_any(const Chunk& c, const Variant& v, const Rule& rule, const VariantScratch& scratch,
                          void* out) {
  vi sizes{};
  if (!c.pairs) {
    for (int i = 0; i < c.padded; i += W)
      sizes = max_i(sizes, leading(store(out, v.out_dtype, i, finished(c, rule, scratch, i)), c.n - i));
    return any_from(sizes, first_overflow(v.out_dtype));
  }
  for (int i = 0; i < c.padded; i += 2 * W) {
    const vf even = canonical(finished(c, rule, scratch, i)), odd = canonical(finished(c, rule, scratch, i + W));
    const vu pair = bf16_pair(even, odd);
    memcpy((uint16_t*)out + i, &pair, sizeof pair);
    const int left = c.n - i;
    sizes = max_i(sizes, max_i(leading(abs_bits(even), (left + 1) / 2), leading(abs_bits(odd), left / 2)));
  }
  return any_from(sizes, first_overflow(kBF16));
}

// Makes one variant of a chunk; returns whether something overflowed.
PF_INLINE bool make(const Chunk& c, bool tame, const Way& way, const Variant& v, const Use* uses, const Rule& rule,
                    const VariantScratch& scratch) {
  uint8_t* const target = (uint8_t*)v.out + c.begin * itemsize(v.out_dtype);
  const bool aside = c.padded != c.n, stream = !aside && (uintptr_t)target % 64 == 0;
  void* out = aside ? (void*)scratch.out : (void*)target;
  bool overflow = false;
  if (tame && c.pairs && way.pairs && !way.shares_means && !way.is_shared) {
    way.pairs(c, uses, v.uses, rule, scratch, (uint16_t*)out, stream);
  } else {
    if (!way.shares_means) (tame ? way.tame : way.any)(c, uses, v.uses, rule, scratch);
    if (tame && c.pairs) {
      if (rule.scaling != 1.0f) finish_tame_pairs<true>(c, rule, scratch, (uint16_t*)out, stream);
      else finish_tame_pairs<false>(c, rule, scratch, (uint16_t*)out, stream);
    } else {
      overflow = finish_any(c, v, rule, scratch, out);
    }
  }
  if (aside) memcpy(target, out, c.n * itemsize(v.out_dtype));
  return overflow;
}

}  // namespace

extern "C" void PETA_JOIN(peta_merge_variants_, PETA_VARIANT)(const VariantGroup& group, const Task* all_terms,
                                                              const Variant* all_variants, const Use* uses,
                                                              const Rule* rules, int64_t begin, int64_t end,
                                                              const VariantScratch& scratch, uint32_t* nonfinite) {
  const Task* terms = all_terms + group.first_term;
  const Variant* variants = all_variants + group.first_variant;
  for (int t = 0; t < group.terms; ++t) scratch.terms[t].used = false;
  for (int v = 0; v < group.variants; ++v) {
    for (int t = 0; t < variants[v].uses; ++t) scratch.terms[uses[variants[v].first_use + t].term].used = true;
    scratch.ways[v] = way_of(variants[v], uses, rules[variants[v].rule]);
    if (v && same_means(variants[v - 1], variants[v], uses, rules))
      scratch.ways[v].shares_means = scratch.ways[v - 1].is_shared = true;
  }
  for (int64_t at = begin; at < end; at += kChunk) {
    Chunk c{};
    c.group = &group, c.begin = at, c.first = group.start + at, c.n = int(end - at < kChunk ? end - at : kChunk);
    c.padded = (c.n + 2 * W - 1) / (2 * W) * (2 * W);
    c.pairs = in_pairs(c, terms, variants, scratch);
    stage(c, terms, scratch);
    for (int v = 0; v < group.variants; ++v) {
      const Variant& variant = variants[v];
      const Use* mine = uses + variant.first_use;
      const Rule& rule = rules[variant.rule];
      const Way& way = scratch.ways[v];
      bool bad = c.base_bad, tame = way.is_tame && c.base_tame;
      for (int t = 0; t < variant.uses; ++t) {
        const TermView& term = scratch.terms[mine[t].term];
        bad |= term.bad, tame = tame && term.tame;
      }
      const bool overflow = make(c, tame, way, variant, mine, rule, scratch);
      nonfinite[v] |= (bad ? 1u : 0u) | (overflow ? 2u : 0u);
    }
  }
#if defined(__AVX512F__)
  _mm_sfence();
#endif
}
