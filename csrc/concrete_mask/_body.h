// The loop, once. A variant file defines PETA_VARIANT and includes this.
#include "../delta_load.h"
#include "../lanes.h"
#include "../philox.h"
#include "concrete_mask.h"

namespace {

PF_INLINE vf clamped(vf x, float low, float high) {  // NaN stays
  x = select(gt(x, splat(high)), splat(high), x);
  return select(gt(splat(low), x), splat(low), x);
}

// exp within 2 ulp, never 0 nor infinite. Source of the polynomial: Moshier, Cephes, expf.
PF_INLINE vf exp_of(vf x) {
  constexpr float kRound = 12582912.0f;  // 1.5 2^23: adding it leaves the nearest whole number in the lowest bits
  x = clamped(x, -87.3f, 88.3f);
  const vf shifted = x * 1.44269504088896341f + kRound, whole = shifted - kRound;
  const vi exponent = (vi)shifted - 0x4b400000;
  const vf r = (x - whole * 0.693359375f) - whole * -2.12194440e-4f;
  vf y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.0f;
  return y * (vf)((exponent + 127) << 23);
}

// log of positive normal numbers, within 2 ulp. Source of the polynomial: Moshier, Cephes, logf.
PF_INLINE vf log_of(vf x) {
  const vf half = (vf)(((vi)x & 0x007fffff) | 0x3f000000);
  const vm small = gt(splat(0.707106781186547524f), half);
  const vi exponent = ((vi)x >> 23) - select(small, splat_i(127), splat_i(126));
  const vf f = (half - splat(1.0f)) + only(small, half), e = __builtin_convertvector(exponent, vf), z = f * f;
  vf y = f * 7.0376836292e-2f - 1.1514610310e-1f;
  y = y * f + 1.1676998740e-1f;
  y = y * f - 1.2420140846e-1f;
  y = y * f + 1.4249322787e-1f;
  y = y * f - 1.6668057665e-1f;
  y = y * f + 2.0000714765e-1f;
  y = y * f - 2.4999993993e-1f;
  y = y * f + 3.3333331174e-1f;
  y = y * f * z + e * -2.12194440e-4f - z * 0.5f;
  return f + y + e * 0.693359375f;
}

PF_INLINE vf load_at(uint64_t p, int32_t dtype, int64_t begin, int i, int n) {
  if (i + W <= n) return load((const void*)p, dtype, begin + i);
  vf v = vf{};
  for (int j = 0; i + j < n; ++j) v[j] = load_one(p, dtype, begin + i + j);
  return v;
}

PF_INLINE void store_at(uint64_t p, int32_t dtype, int64_t begin, int i, int n, vf v) {
  const int count = n - i < W ? n - i : W;
  if (dtype == kF32) {
    memcpy((float*)p + begin + i, &v, count * 4);
    return;
  }
  const vh half = dtype == kF16 ? to_f16(canonical(v)) : narrow_32(round_to_bf16(canonical(v)) >> 16);
  memcpy((uint16_t*)p + begin + i, &half, count * 2);
}

// As above, with the usual case, a whole vector of fp32, told to the compiler.
PF_INLINE vf load_f32(uint64_t p, int64_t begin, int i, int n) {
  return i + W <= n ? load_raw<vf>((const float*)p + begin + i) : load_at(p, kF32, begin, i, n);
}

PF_INLINE void store_f32(uint64_t p, int64_t begin, int i, int n, vf v) {
  if (i + W <= n) memcpy((float*)p + begin + i, &v, sizeof v);
  else store_at(p, kF32, begin, i, n, v);
}

// m of a block, with room for n rounded up to W. u = a 2^-24 and 1 - u = b 2^-24 in whole numbers a, b, so that at
// temperature 1/2 m = a^2 / (a^2 + b^2 e^(-2 logit)): no logarithm, and one division.
template <bool kSquare>
PF_INLINE void mask_of(const MaskTensor& t, float inverse_temperature, int64_t begin, int n, const MaskScratch& s) {
  philox_words(s.words, t.key, uint64_t(begin), n);
  for (int i = 0; i < n; i += W) {
    vi k = max_i((vi)(load_raw<vu>(s.words + i) >> 8), splat_i(2));
    k = select(gt(k, splat_i((1 << 24) - 2)), splat_i((1 << 24) - 2), k);
    const vf a = __builtin_convertvector(k, vf), b = __builtin_convertvector(splat_i(1 << 24) - k, vf);
    prefetch((const float*)t.logits + begin + i + kMaskBlock);  // of the next block, whose noise comes first
    const vf logit = load_f32(t.logits, begin, i, n);
    const vf top = kSquare ? a * a : splat(1.0f);
    const vf rest = kSquare ? b * b * exp_of(logit * -2.0f) : exp_of((log_of(b / a) - logit) * inverse_temperature);
    const vf m = top / (top + rest);
    memcpy(s.m + i, &m, sizeof m);
  }
}

PF_INLINE void fill_mask(const MaskTensor& t, const MaskSettings& settings, int64_t begin, int n, const MaskScratch& s) {
  if (!t.logits) {
    for (int i = 0; i < n; i += W) {
      const vf one = splat(1.0f);
      memcpy(s.m + i, &one, sizeof one);
    }
  } else if (settings.temperature == 0.5) {
    mask_of<true>(t, 2.0f, begin, n, s);
  } else {
    mask_of<false>(t, float(1.0 / settings.temperature), begin, n, s);
  }
}

PF_INLINE void pad_with_zeros(float* values, int n) {
  for (int i = n; i % 32; ++i) values[i] = 0.0f;
}

// take(i, x) for every vector x of a block of `dtype`: the branch on the dtype is taken once a block.
template <class Take>
PF_INLINE void each_vector(uint64_t p, int32_t dtype, int64_t begin, int n, Take take) {
  const int whole = n / W * W;
  if (dtype == kF32) {
    for (int i = 0; i < whole; i += W) {
      prefetch_l2((const float*)p + begin + i + kMaskBlock);
      take(i, load_raw<vf>((const float*)p + begin + i));
    }
  } else if (dtype == kBF16) {
    for (int i = 0; i < whole; i += W) take(i, load_bf16((const uint16_t*)p + begin + i));
  } else {
    for (int i = 0; i < whole; i += W) take(i, load_f16((const uint16_t*)p + begin + i));
  }
  if (whole < n) take(whole, load_at(p, dtype, begin, whole, n));
}

// total[i] = sum over the tasks, in their order, of lambda_t term(i, x_t); -0 where there are none.
template <class Term>
PF_INLINE void weighted_sum(const MaskTensor& t, const MaskTask* tasks, int64_t begin, int n, float* total, Term term) {
  for (int k = 0; k < t.tasks; ++k) {
    const vf coefficient = splat(tasks[k].coefficient);
    const bool first = k == 0;
    each_vector(tasks[k].x, tasks[k].dtype, begin, n, [&](int i, vf x) {
      const vf e = coefficient * term(i, x), sum = first ? e : load_raw<vf>(total + i) + e;
      memcpy(total + i, &sum, sizeof sum);
    });
  }
  for (int i = 0; !t.tasks && i < n; i += W) {
    const vf zero = -vf{};
    memcpy(total + i, &zero, sizeof zero);
  }
}

// Adds in the order of the tasks what the fused merge of masked_task_arithmetic adds, rounding where it rounds.
PF_INLINE void merge_block(const MaskTensor& t, const MaskTask* tasks, int64_t begin, int n, const MaskScratch& s) {
  const vf inverse = splat(t.mean > 0.0 ? float(1.0 / t.mean) : 0.0f);
  const float* m = s.m;
  if (t.logits) weighted_sum(t, tasks, begin, n, s.total, [=](int i, vf x) { return x * load_raw<vf>(m + i) * inverse; });
  else weighted_sum(t, tasks, begin, n, s.total, [](int, vf x) { return x; });
  float* total = s.total;
  if (t.base)
    each_vector(t.base, t.base_dtype, begin, n, [=](int i, vf base) {
      const vf sum = base + load_raw<vf>(total + i);
      memcpy(total + i, &sum, sizeof sum);
    });
  if (t.out_dtype == kF32) memcpy((float*)t.out + begin, total, n * 4);
  else
    for (int i = 0; i < n; i += W) store_at(t.out, t.out_dtype, begin, i, n, load_raw<vf>(total + i));
}

PF_INLINE void reduce_block(const MaskTensor& t, const MaskTask* tasks, int64_t begin, int n, const MaskScratch& s,
                            double* sums) {
  const int padded = (n + 31) / 32 * 32;
  float* gm = s.m;
  each_vector(t.g, t.g_dtype, begin, n, [=](int i, vf g) {
    const vf product = g * load_raw<vf>(gm + i);
    memcpy(gm + i, &product, sizeof product);
  });
  pad_with_zeros(gm, n);
  for (int k = 0; k < t.tasks; ++k) {
    const float* x = (const float*)tasks[k].x + begin;
    if (tasks[k].dtype != kF32 || n != padded) {
      float* staged = s.staged;
      each_vector(tasks[k].x, tasks[k].dtype, begin, n, [=](int i, vf v) { memcpy(staged + i, &v, sizeof v); });
      pad_with_zeros(staged, n);
      x = staged;
    }
    sums[k] = sum_in_lanes(padded, [=](int j) { return wide(gm + j) * wide(x + j); });
  }
}

// total = g sum_t lambda_t tau_t; with no tasks, g, which is that product already.
PF_INLINE void times_direction(const MaskTensor& t, const MaskTask* tasks, int64_t begin, int n, float* total) {
  weighted_sum(t, tasks, begin, n, total, [](int, vf x) { return x; });
  const bool ready = t.tasks == 0;
  each_vector(t.g, t.g_dtype, begin, n, [=](int i, vf g) {
    const vf product = ready ? g : g * load_raw<vf>(total + i);
    memcpy(total + i, &product, sizeof product);
  });
}

PF_INLINE vf root_of(vf x) {
#if defined(__AVX512F__)
  return (vf)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  return (vf)_mm256_sqrt_ps((__m256)x);
#else
  vf v;
  for (int i = 0; i < W; ++i) v[i] = __builtin_sqrtf(x[i]);
  return v;
#endif
}

PF_INLINE void adam_step(const MaskTensor& t, const MaskSettings& a, int64_t begin, int i, int n, vf g) {
  const vf first = load_f32(t.exp_avg, begin, i, n) * a.beta1 + g * (1.0f - a.beta1);
  const vf second = load_f32(t.exp_avg_sq, begin, i, n) * a.beta2 + g * g * (1.0f - a.beta2);
  const vf step = splat(a.rate) * first / (root_of(second) * a.root + a.epsilon);
  store_f32(t.exp_avg, begin, i, n, first);
  store_f32(t.exp_avg_sq, begin, i, n, second);
  store_f32(t.logits, begin, i, n, load_f32(t.logits, begin, i, n) - step);
}

PF_INLINE void update_block(const MaskTensor& t, const MaskTask* tasks, const MaskSettings& settings, int64_t begin,
                            int n, const MaskScratch& s) {
  const float inverse = t.mean > 0.0 ? float(1.0 / t.mean) : 0.0f, shift = float(t.shift);
  const float slope = float(1.0 / settings.temperature);
  times_direction(t, tasks, begin, n, s.total);
  for (int i = 0; i < n; i += W) {
    const vf m = load_raw<vf>(s.m + i);
    const vf gradient = (load_raw<vf>(s.total + i) * inverse - shift) * (m * (splat(1.0f) - m) * slope);
    if (t.gradient) store_f32(t.gradient, begin, i, n, gradient);
    else adam_step(t, settings, begin, i, n, gradient);
  }
}

}  // namespace

extern "C" void PETA_JOIN(peta_concrete_mask_, PETA_VARIANT)(MaskMode mode, const MaskTensor& t, const MaskTask* all,
                                                             const MaskSettings& settings, int64_t begin, int n,
                                                             const MaskScratch& s, double* sums) {
  const MaskTask* tasks = all + t.first_task;
  fill_mask(t, settings, begin, n, s);
  if (mode == kMaskSample) {
    for (int i = 0; i < n; i += W) store_f32(t.out, begin, i, n, load_raw<vf>(s.m + i));
  } else if (mode == kMaskMean) {
    pad_with_zeros(s.m, n);
    const float* m = s.m;
    sums[0] = sum_in_lanes((n + 31) / 32 * 32, [=](int j) { return wide(m + j); });
  } else if (mode == kMaskMerge) {
    merge_block(t, tasks, begin, n, s);
  } else if (mode == kMaskReduce) {
    reduce_block(t, tasks, begin, n, s, sums);
    if (!t.product) return;
    times_direction(t, tasks, begin, n, s.total);
    memcpy((float*)t.product + begin, s.total, n * 4);
  } else {
    update_block(t, tasks, settings, begin, n, s);
  }
}
