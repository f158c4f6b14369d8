// The loop, once. A variant file defines PETA_VARIANT and includes this.
#include "../philox.h"
#include "algebra.h"

namespace {

PF_INLINE void widen(float* out, const void* p, int32_t dtype, int64_t first, int n) {
  if (dtype == kBits) {
    for (int i = 0; i < n; ++i) out[i] = float(((const uint8_t*)p)[(first + i) >> 3] >> ((first + i) & 7) & 1);
  } else if (dtype == kBytes) {
    for (int i = 0; i < n; ++i) out[i] = ((const uint8_t*)p)[first + i] ? 1.0f : 0.0f;
  } else if (dtype == kF32) {
    memcpy(out, (const float*)p + first, n * 4);
  } else {
    for (int i = 0; i < n; ++i) {
      const uint16_t h = load_raw<uint16_t>((const uint16_t*)p + first + i);
      const uint32_t u = uint32_t(h) << 16;
      if (dtype == kF16) out[i] = half_to_float(h);
      else memcpy(&out[i], &u, 4);
    }
  }
}

// delta, sparsified, masked, prescaled. `bad` collects the largest |d| as bits: above all finite ones if any is not.
PF_INLINE vf contribution(const Task& task, const View& view, vf base, int i, int64_t first, vi& bad, vf& delta) {
  const vf x = load(view.x, task.dtype, i);
  const vf d = task.is_delta ? x : x - base;
  const vi a = abs_bits(d);
  bad = max_i(bad, a);
  delta = d;
  vf e = d;
  if (task.keep != kKeepAll) e = only(kept(task, view, a, i, first), d);
  if (view.mask) {
    const vf m = load_raw<vf>(view.mask + i);
    bad = max_i(bad, abs_bits(m));
    e = e * m;
  }
  if (task.by_probability) e = e * (splat(1.0f) / load_raw<vf>(view.probability + i));
  if (task.prescale != 1.0f) e = e * task.prescale;
  return e;
}

PF_INLINE vf weight_of(const Task& task, const View& view, int i, vi& bad) {
  if (!view.weights) return splat(task.weight);
  const vf f = load_raw<vf>(view.weights + i);
  bad = max_i(bad, abs_bits(f));
  return splat(task.weight) * f;
}

// The mean of the contributions that have the elected sign, by their weights, all of which are positive; -0 where
// there are none, NaN where the total is not finite. kZero: the sign that a zero total counts as. Where that is none, a
// total that is not zero has a contribution of its own sign, so that nothing else is divided by zero.
template <int kTasks, int kZero>
PF_INLINE vf agreeing_mean(vf total, const vf* weighted, const vf* weights) {
  vf sum = -vf{}, divisor = vf{};
  if (kZero == 0) {
    for (int t = 0; t < kTasks; ++t) {
      const vm agrees = gt((vi)with_sign_times(weighted[t], total), vi{});
      sum = t ? add_where(agrees, sum, weighted[t]) : only(agrees, weighted[t]);
      divisor = t ? add_where(agrees, divisor, weights[t]) : only(agrees, weights[t]);
    }
    return where_clear<true>(total, sum / divisor);
  }
  const vm down = kZero < 0 ? no(gt(total, vf{})) : gt(vf{}, total);
  vm anyone = none();
  for (int t = 0; t < kTasks; ++t) {
    const vm agrees = gt(flip_where(down, weighted[t]), vf{});
    sum = add_where(agrees, sum, weighted[t]);
    divisor = add_where(agrees, divisor, weights[t]);
    anyone = either(anyone, agrees);
  }
  return divide_where(anyone, where_clear<false>(total, sum), divisor);
}

struct Chunk {
  const View* views;
  const void* base;
  int32_t base_dtype;
  const float* sign;
  void* out;
  int n, real;    // elements: whole vectors with the caller's padding, and without it
  int64_t first;  // flat index of the chunk's first element within its tensor
};

PF_INLINE vf base_value(const Chunk& c, const Rule& rule, int i) {
  if (rule.base_kind == kBaseTensor) return load(c.base, c.base_dtype, i);
  return rule.base_kind == kBaseOne ? splat(1.0f) : vf{};
}

template <bool kElecting, bool kExtreme>
void merge_chunk(const Chunk& c, const Piece& piece, const Task* tasks, const Rule& rule, const Scratch& scratch,
                 vi& bad, vi& largest) {
  const int T = piece.tasks;
  vf* sorted = (vf*)scratch.sorted;
  const bool by_median = !kElecting && rule.aggregate == kMedian;
  for (int i = 0; i < c.n; i += W) {
    const vf base = base_value(c, rule, i);
    Sums s;
    for (int t = 0; t < T; ++t) {
      vf delta;
      const vf x = contribution(tasks[t], c.views[t], base, i, c.first + i, bad, delta);
      const vf w = weight_of(tasks[t], c.views[t], i, bad), wx = x * w;
      if (by_median) insert_sorted(sorted, t, wx);
      else accumulate<kElecting, kExtreme>(s, rule, x, w, wx);
    }
    if (by_median) s.total = median(sorted, T);
    if (kElecting && rule.elect == kElectGiven) {
      s.total = load_raw<vf>(c.sign + i);
      bad = max_i(bad, abs_bits(s.total));
    }
    const Elected e = elected<kElecting>(s, rule);
    vf y = divided(e.sum, e.divisor, rule);
    if (rule.scaling != 1.0f) y = y * rule.scaling;
    if (rule.base_kind != kBaseZero) {
      y = select(eq(y, vf{}), base, base + y);
      bad = max_i(bad, abs_bits(base));
    }
    largest = max_i(largest, leading(store(c.out, piece.out_dtype, i, y), c.real - i));
  }
}

// The common case, with everything known when it is compiled: all inputs and the output of one dtype, differences from
// a base, all entries or the top ones, weights by task, and either a plain sum or the mean of those that agree with the
// sign of the weighted sum. Two vectors at once in bf16.
template <int32_t kDtype>
struct Lanes {
  static constexpr int kVectors = kDtype == kBF16 ? 2 : 1;
  static constexpr int kAhead = 2048;  // bytes; half a page, where the hardware's own prefetching ends

  PF_INLINE void load_at(const void* p, int i, vf* v, bool fetch_ahead) {
    if (fetch_ahead) prefetch((const uint8_t*)p + i * itemsize(kDtype) + kAhead);
    if (kDtype == kBF16) load_bf16_pair((const uint16_t*)p + i, v[0], v[1]);
    else v[0] = load(p, kDtype, i);
  }

  // The largest magnitude stored so far, as the bits of the output's dtype, of which two vectors share one in bf16.
  typedef typename std::conditional<kDtype == kBF16, vs, vi>::type Largest;

  PF_INLINE void store_at(void* p, int i, const vf* v, bool stream, Largest& largest) {
    if constexpr (kDtype != kBF16) {
      largest = max_i(largest, store(p, kDtype, i, v[0]));
    } else {
      store_pair((uint16_t*)p + i, bf16_pair(v[0], v[1]), stream, largest);
    }
  }

  PF_INLINE void store_pair(uint16_t* p, vu pair, bool stream, vs& largest) {
    largest = max_s(largest, (vs)(pair & 0x7fff7fffu));
#if defined(__AVX512F__)
    if (stream) return _mm512_stream_si512((__m512i*)p, (__m512i)pair);
#else
    (void)stream;
#endif
    memcpy(p, &pair, sizeof pair);
  }

  PF_INLINE bool finite(Largest largest) {
    if constexpr (kDtype == kBF16) return all(eq((vi)(((vu)largest + 0x00800080u) & 0x80008000u), vi{}));
    else return all(gt(splat_i(first_overflow(kDtype)), largest));
  }
};

// With an election two loops, each with a short chain of dependent instructions, so that the CPU overlaps many
// elements: merged values into scratch; then their rounding. kZero: the sign that a zero sum counts as.
// Every input that is not finite, and every overflow, shows in what is written, so that alone is looked at: true when
// all is finite. Otherwise the general loop goes over the chunk again and says what is not.
template <int32_t kDtype, bool kTop, bool kElecting, int kZero, int kTasks>
bool merge_plain_chunk(const Chunk& c, const Piece& piece, const Task* tasks, const Rule& given,
                       const Scratch& scratch, bool stream) {
  using L = Lanes<kDtype>;
  constexpr int V = L::kVectors, kKnown = kTasks ? kTasks : 1;
  constexpr bool kOneGroup = kElecting && kTasks;  // the number known, only one group is summed, after its election
  // A contribution that is not 0 is at least 2/3 of weight times delta, so that a mean is no less than half of the
  // smallest number: the only zero is that of a total, written -0, which leaves any base as it is.
  constexpr bool kNeverPlusZero = kOneGroup && kZero == 0;
  const int T = kTasks ? kTasks : piece.tasks, n = c.n;
  const void* const base_at = c.base;
  void* const out_at = c.out;
  Rule rule = given;
  rule.floor = 0.0f;
  rule.zero_sign = kZero;
  rule.elect = kElecting ? kElectWeighted : kElectNone;
  rule.divide = kElecting ? kDivideAgreeingWeight : kDivideConstant;
  vf weights[kKnown];
  vi belows[kKnown];
  const void* inputs[kKnown];
  for (int t = 0; t < kTasks; ++t)
    weights[t] = splat(tasks[t].weight), belows[t] = splat_i(c.views[t].below), inputs[t] = c.views[t].x;
  float* const merged = scratch.sign;
  typename L::Largest largest{};
  const auto merge_all = [&](auto scaled) __attribute__((always_inline)) {
    for (int i = 0; i < n; i += V * W) {
      vf base[V], weighted[V][kKnown], y[V];
      Sums s[V];
      L::load_at(base_at, i, base, true);
      for (int t = 0; t < T; ++t) {
        const vf w = kTasks ? weights[t] : splat(tasks[t].weight);
        const vi below = kTasks ? belows[t] : splat_i(c.views[t].below);
        vf x[V];
        L::load_at(kTasks ? inputs[t] : c.views[t].x, i, x, true);
        for (int v = 0; v < V; ++v) {
          const vf d = x[v] - base[v];
          const vf wd = kTop ? mul_where(gt(abs_bits(d), below), d, w) : d * w;
          if (!kOneGroup) accumulate<kElecting, false>(s[v], rule, d, w, wd);
          else s[v].total = t ? s[v].total + wd : wd, weighted[v][t] = wd;
        }
      }
      for (int v = 0; v < V; ++v) {
        vf mean;
        if (kOneGroup) {
          mean = agreeing_mean<kKnown, kZero>(s[v].total, weighted[v], weights);
        } else {
          const Elected e = elected<kElecting>(s[v], rule);
          mean = divided(kElecting ? where_clear<false>(s[v].total, e.sum) : e.sum, e.divisor, rule);
        }
        if (scaled) mean = mean * rule.scaling;
        y[v] = kNeverPlusZero && !scaled ? base[v] + mean : add_where(no(eq(mean, vf{})), base[v], mean);
      }
      for (int v = 0; v < V && kElecting; ++v) memcpy(merged + i + v * W, &y[v], sizeof y[v]);
      if (!kElecting) L::store_at(out_at, i, y, stream, largest);
    }
  };
  if (rule.scaling != 1.0f) merge_all(std::true_type());
  else merge_all(std::false_type());
  for (int i = 0; i < n && kElecting; i += V * W) {
    vf y[V];
    for (int v = 0; v < V; ++v) y[v] = load_raw<vf>(merged + i + v * W);
    L::store_at(out_at, i, y, stream, largest);
  }
  return L::finite(largest);
}

typedef void (*MergeChunk)(const Chunk&, const Piece&, const Task*, const Rule&, const Scratch&, vi& bad, vi& largest);
typedef bool (*MergePlainChunk)(const Chunk&, const Piece&, const Task*, const Rule&, const Scratch&, bool stream);

// A weighted sum of fp32 that needs no subtraction, as formed factors are: kTasks of them, 0 for any number.
template <int32_t kDtype, int kTasks>
void sum_chunk(const Chunk& c, const Piece& piece, const Task* tasks, const Rule& rule, const Scratch&, vi& bad,
               vi& largest) {
  const int T = kTasks ? kTasks : piece.tasks;
  const bool adds = rule.base_kind == kBaseTensor, divides = rule.divisor != 1.0f, scales = rule.scaling != 1.0f;
  for (int i = 0; i < c.n; i += W) {
    vf y = -vf{};
    for (int t = 0; t < T; ++t) {
      const vf d = load_raw<vf>((const float*)c.views[t].x + i);
      bad = max_i(bad, abs_bits(d));
      y = y + d * tasks[t].weight;
    }
    if (divides) y = y / rule.divisor;
    if (scales) y = y * rule.scaling;
    if (adds) {
      const vf base = load(c.base, kDtype, i);
      y = select(eq(y, vf{}), base, base + y);
      bad = max_i(bad, abs_bits(base));
    }
    largest = max_i(largest, leading(store(c.out, kDtype, i, y), c.real - i));
  }
}

template <int32_t kDtype>
MergeChunk sum_loop(int tasks) {
  return tasks == 1 ? sum_chunk<kDtype, 1> : tasks == 3 ? sum_chunk<kDtype, 3> : sum_chunk<kDtype, 0>;
}

// Null where the sum is no plain one.
MergeChunk sum_loop_for(const Piece& piece, const Task* tasks, const Rule& rule) {
  if (rule.elect != kElectNone || rule.aggregate != kSum || rule.divide != kDivideConstant) return nullptr;
  if (rule.base_kind == kBaseOne || (rule.base_kind == kBaseTensor && piece.base_dtype != piece.out_dtype)) return nullptr;
  for (int t = 0; t < piece.tasks; ++t) {
    const Task& k = tasks[t];
    if (k.dtype != kF32 || !(k.is_delta || rule.base_kind == kBaseZero)) return nullptr;
    if (k.keep != kKeepAll || k.mask || k.weights || k.prescale != 1.0f || k.by_probability) return nullptr;
  }
  if (piece.out_dtype == kBF16) return sum_loop<kBF16>(piece.tasks);
  return piece.out_dtype == kF16 ? sum_loop<kF16>(piece.tasks) : sum_loop<kF32>(piece.tasks);
}

MergeChunk general_loop(const Rule& rule) {
  const bool extreme = rule.aggregate == kMax || rule.aggregate == kLargestFirst || rule.aggregate == kLargestLast;
  if (rule.elect != kElectNone) return extreme ? merge_chunk<true, true> : merge_chunk<true, false>;
  return extreme ? merge_chunk<false, true> : merge_chunk<false, false>;
}

// One model as it is, in fp32 (formed factors) or in the output's dtype: rounded, looked at, stored.
template <int32_t kDtype, bool kWidened>
bool keep_chunk(const Chunk& c, const Piece&, const Task*, const Rule&, const Scratch&, bool stream) {
  using L = Lanes<kDtype>;
  constexpr int V = L::kVectors;
  typename L::Largest largest{};
  vi magnitude{};  // in fp32, whose NaN may be any, so that rounding could make it a number
  for (int i = 0; i < c.n; i += V * W) {
    vf x[V];
    if (!kWidened) L::load_at(c.views[0].x, i, x, true);
    for (int v = 0; v < V && kWidened; ++v) {
      x[v] = load_raw<vf>((const float*)c.views[0].x + i + v * W);
      magnitude = max_i(magnitude, abs_bits(x[v]));
    }
    if constexpr (kWidened && kDtype == kBF16) L::store_pair((uint16_t*)c.out + i, bf16_in_order(x[0], x[1]), stream, largest);
    else L::store_at(c.out, i, x, stream, largest);
  }
  return kWidened ? all(gt(splat_i(first_overflow(kDtype)), magnitude)) : L::finite(largest);
}

// Null where the output is no such model.
MergePlainChunk keep_loop_for(const Piece& piece, const Task* tasks, const Rule& rule) {
  const Task& k = tasks[0];
  if (piece.tasks != 1 || rule.base_kind != kBaseZero || rule.elect != kElectNone || rule.aggregate != kSum) return nullptr;
  if (rule.divide != kDivideConstant || rule.divisor != 1.0f || rule.scaling != 1.0f || rule.floor != 0.0f) return nullptr;
  if (k.keep != kKeepAll || k.mask || k.weights || k.prescale != 1.0f || k.by_probability || k.weight != 1.0f) return nullptr;
  if (piece.out_dtype == kBF16 && k.dtype == kF32) return keep_chunk<kBF16, true>;
  if (piece.out_dtype == kBF16 && k.dtype == kBF16) return keep_chunk<kBF16, false>;
  if (piece.out_dtype == kF16 && k.dtype == kF32) return keep_chunk<kF16, true>;
  if (piece.out_dtype == kF16 && k.dtype == kF16) return keep_chunk<kF16, false>;
  return piece.out_dtype == kF32 && k.dtype == kF32 ? keep_chunk<kF32, true> : nullptr;
}

bool is_plain(const Piece& piece, const Task* tasks, const Rule& rule) {
  if (rule.base_kind != kBaseTensor || rule.aggregate != kSum || rule.floor != 0.0f || !piece.tasks) return false;
  const bool ties = rule.elect == kElectWeighted && rule.divide == kDivideAgreeingWeight;
  if (!ties && !(rule.elect == kElectNone && rule.divide == kDivideConstant)) return false;
  if (piece.out_dtype != piece.base_dtype) return false;
  for (int t = 0; t < piece.tasks; ++t) {
    const Task& k = tasks[t];
    if (k.dtype != piece.base_dtype || k.is_delta || k.mask || k.weights || k.prescale != 1.0f) return false;
    if (k.keep != tasks[0].keep || (k.keep != kKeepAll && k.keep != kKeepTop)) return false;
  }
  return true;
}

static constexpr float kLargest = 0x1.fffffep127f;

template <int32_t kDtype, bool kTop, bool kElecting, int kZero>
MergePlainChunk plain_loop(int tasks) {
  switch (tasks) {
    case 2: return merge_plain_chunk<kDtype, kTop, kElecting, kZero, 2>;
    case 3: return merge_plain_chunk<kDtype, kTop, kElecting, kZero, 3>;
    case 4: return merge_plain_chunk<kDtype, kTop, kElecting, kZero, 4>;
    default: return merge_plain_chunk<kDtype, kTop, kElecting, kZero, 0>;
  }
}

template <int32_t kDtype, bool kTop>
MergePlainChunk plain_loop(const Rule& rule, const Task* all, int tasks) {
  float sum = 0.0f;
  for (int t = 0; t < tasks; ++t) {
    sum += all[t].weight;
    if (!(all[t].weight > 0.0f) || sum > kLargest) tasks = 0;  // weights that cancel divide by one; and no infinity
  }
  if (rule.elect == kElectNone) return plain_loop<kDtype, kTop, false, 0>(tasks);
  if (rule.zero_sign > 0) return plain_loop<kDtype, kTop, true, 1>(tasks);
  return rule.zero_sign < 0 ? plain_loop<kDtype, kTop, true, -1>(tasks) : plain_loop<kDtype, kTop, true, 0>(tasks);
}

// Null where only the general loop serves.
MergePlainChunk plain_loop_for(const Piece& piece, const Task* tasks, const Rule& rule) {
  if (!is_plain(piece, tasks, rule)) return keep_loop_for(piece, tasks, rule);
  const bool top = tasks[0].keep == kKeepTop;
  if (piece.out_dtype == kBF16) return (top ? plain_loop<kBF16, true> : plain_loop<kBF16, false>)(rule, tasks, piece.tasks);
  if (piece.out_dtype == kF16) return (top ? plain_loop<kF16, true> : plain_loop<kF16, false>)(rule, tasks, piece.tasks);
  return (top ? plain_loop<kF32, true> : plain_loop<kF32, false>)(rule, tasks, piece.tasks);
}

// Sets what the plain loop compares |d| with; false when an exact count ends within this chunk.
PF_INLINE bool one_threshold_each(const Chunk& c, View* views, const Task* tasks, int num_tasks, int n) {
  for (int t = 0; t < num_tasks; ++t) {
    const bool equals_kept = tasks[t].low_index >= c.first + n - 1;
    if (!equals_kept && tasks[t].low_index >= c.first) return false;
    views[t].below = int32_t(tasks[t].low) - (equals_kept ? 1 : 0);
    if (tasks[t].keep == kKeepTop && views[t].below >= int32_t(kInfBits)) return false;  // it would hide infinities
  }
  return true;
}

PF_INLINE bool overlap(uint64_t a, int64_t a_bytes, uint64_t b, int64_t b_bytes) {
  return a < b + uint64_t(b_bytes) && b < a + uint64_t(a_bytes);
}

bool overwrites_an_input(const Piece& piece, const Task* tasks) {
  const int64_t bytes = piece.size * itemsize(piece.out_dtype);
  bool any = overlap(piece.out, bytes, piece.base, piece.size * itemsize(piece.base_dtype));
  for (int t = 0; t < piece.tasks; ++t)
    any |= overlap(piece.out, bytes, tasks[t].x, piece.size * itemsize(tasks[t].dtype));
  return any;
}

PF_INLINE void norm_chunk(const Chunk& c, const Piece& piece, const Task* tasks, const Rule& rule, int n,
                          const Scratch& scratch) {
  vi bad = vi{};
  for (int t = 0; t < piece.tasks; ++t) {
    float *values = scratch.sign, *kept_values = scratch.out;  // both unused when only sums are asked for
    for (int i = 0; i < c.n; i += W) {
      vf delta;
      const vf e = contribution(tasks[t], c.views[t], base_value(c, rule, i), i, c.first + i, bad, delta);
      const vi d_bits = abs_bits(delta), e_bits = abs_bits(e);
      memcpy(values + i, &d_bits, sizeof d_bits);
      memcpy(kept_values + i, &e_bits, sizeof e_bits);
    }
    for (int which = 0; which < 2; ++which) {
      const float* v = which ? kept_values : values;
      double* lane = scratch.sums + (t * 2 + which) * 32;
      int i = 0;
      for (; i + 32 <= n; i += 32)
        for (int j = 0; j < 32; ++j) lane[j] += double(v[i + j]);
      for (int j = 0; i + j < n; ++j) lane[j] += double(v[i + j]);
    }
  }
}

PF_INLINE int64_t sign_chunk(const Chunk& c, const Piece& piece, const Task* tasks, const Rule& rule, int n, vi& bad) {
  int64_t total = 0;
  for (int i = 0; i < c.n; i += W) {
    const vf base = base_value(c, rule, i);
    Sums s;
    for (int t = 0; t < piece.tasks; ++t) {
      vf delta;
      const vf e = contribution(tasks[t], c.views[t], base, i, c.first + i, bad, delta);
      const vf w = weight_of(tasks[t], c.views[t], i, bad);
      accumulate<true, false>(s, rule, e, w, e * w);
    }
    const uint32_t real = n - i >= W ? ~0u : n > i ? (1u << (n - i)) - 1u : 0u;
    total += __builtin_popcount(lanes(gt(s.total, vf{})) & real) - __builtin_popcount(lanes(gt(vf{}, s.total)) & real);
  }
  return total;
}

PF_INLINE const float* widened(float* row, uint64_t p, int32_t dtype, int64_t first, int n) {
  memset(row + n / (2 * W) * (2 * W), 0, 2 * W * 4);
  widen(row, (const void*)p, dtype, first, n);
  return row;
}

// Points every task at its elements of the chunk; what is stored in another form is staged in scratch. A chunk that
// is no whole number of vectors is copied to padded scratch, so that one loop serves all.
PF_INLINE Chunk open_chunk(const Piece& piece, const Task* tasks, int64_t begin, int n, const Scratch& scratch) {
  const int padded = (n + 2 * W - 1) / (2 * W) * (2 * W);  // a loop may take two vectors at once
  const bool ragged = padded != n;
  View* views = scratch.views;
  Chunk c;
  c.views = views, c.n = padded, c.real = n, c.first = piece.start + begin;
  c.base_dtype = piece.base_dtype;
  c.base = piece.base ? (const uint8_t*)piece.base + begin * itemsize(piece.base_dtype) : nullptr;
  c.out = (uint8_t*)piece.out + begin * (piece.out ? itemsize(piece.out_dtype) : 0);
  if (ragged && c.base) c.base = padded_copy(scratch.base, c.base, n * itemsize(piece.base_dtype));
  c.sign = piece.sign ? widened(scratch.sign, piece.sign, piece.sign_dtype, begin, n) : nullptr;
  for (int t = 0; t < piece.tasks; ++t) {
    const Task& task = tasks[t];
    View& v = views[t];
    const int64_t row = int64_t(t) * kRow;
    v.x = (const uint8_t*)task.x + begin * itemsize(task.dtype);
    if (ragged) v.x = padded_copy(scratch.input + row, v.x, n * itemsize(task.dtype));
    v.mask = v.weights = v.probability = nullptr;
    v.words = nullptr;
    if (task.keep == kKeepRandom || task.keep == kKeepRandomPerElement) {
      const uint64_t offset = uint64_t(c.first) % 4;
      uint32_t* words = (uint32_t*)scratch.words + row;
      philox_words(words, task.key, uint64_t(c.first) - offset, n + int(offset));
      v.words = words + offset;
      v.below = first_at_least(task.p);
    }
    if (task.keep == kKeepRandomPerElement) {
      v.probability = (const float*)task.probability + begin;
      if (ragged) {
        float* copy = scratch.probability + row;
        for (int i = n; i < c.n; ++i) copy[i] = 1.0f;  // a divisor, in the padding too
        memcpy(copy, v.probability, n * 4);
        v.probability = copy;
      }
    }
    if (task.mask)
      v.mask = widened(scratch.mask + row, task.mask, task.mask_dtype, task.mask_dtype == kBits ? c.first : begin, n);
    if (task.weights) v.weights = widened(scratch.weights + row, task.weights, task.weights_dtype, begin, n);
  }
  return c;
}

PF_INLINE double tree_sum_32(const double* lane) {
  double s[32];
  memcpy(s, lane, sizeof s);
  for (int half = 16; half; half /= 2)
    for (int j = 0; j < half; ++j) s[j] = s[j] + s[j + half];
  return s[0];
}

}  // namespace

extern "C" void PETA_JOIN(peta_delta_merge_, PETA_VARIANT)(Mode mode, Piece& piece, const Task* all_tasks,
                                                           const Rule& rule, int64_t begin, int64_t end,
                                                           const Scratch& scratch, uint32_t* nonfinite,
                                                           int64_t* sign_total) {
  const Task* tasks = all_tasks + piece.first_task;
  const int T = piece.tasks;
  const MergeChunk sum = sum_loop_for(piece, tasks, rule), general = sum ? sum : general_loop(rule);
  const MergePlainChunk plain = plain_loop_for(piece, tasks, rule);
  const bool staged = plain && overwrites_an_input(piece, tasks);
  vi bad = vi{}, largest = vi{};
  int64_t signs = 0;
  for (int64_t at = begin; at < end; at += kChunk) {
    const int n = int(end - at < kChunk ? end - at : kChunk);
    Chunk c = open_chunk(piece, tasks, at, n, scratch);
    if (mode == kKeptNorm) {
      if (at % kBlock == 0) memset(scratch.sums, 0, sizeof(double) * T * 64);
      norm_chunk(c, piece, tasks, rule, n, scratch);
      if ((at + kChunk) % kBlock == 0 || at + kChunk >= end)
        for (int k = 0; k < 2 * T; ++k)
          ((double*)piece.partials)[at / kBlock * 2 * T + k] = tree_sum_32(scratch.sums + k * 32);
    } else if (mode == kSignTotal) {
      signs += sign_chunk(c, piece, tasks, rule, n, bad);
    } else {
      const bool aside = c.n != n || staged;  // a second go over the chunk must find its inputs as they were
      if (aside) c.out = scratch.out;
      const bool stream = (uintptr_t)c.out % 64 == 0 && !aside;
      const bool done = plain && one_threshold_each(c, scratch.views, tasks, T, n) &&
                        plain(c, piece, tasks, rule, scratch, stream);
      if (!done) general(c, piece, tasks, rule, scratch, bad, largest);
      if (aside) memcpy((uint8_t*)piece.out + at * itemsize(piece.out_dtype), c.out, n * itemsize(piece.out_dtype));
    }
  }
#if defined(__AVX512F__)
  _mm_sfence();
#endif
  *nonfinite |= (any_from(bad, kInfBits) ? 1u : 0u) | (any_from(largest, first_overflow(piece.out_dtype)) ? 2u : 0u);
  *sign_total += signs;
}
