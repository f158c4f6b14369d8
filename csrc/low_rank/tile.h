// The loops that form elements of a low-rank product, for variant files.
#pragma once
#include "../simd.h"
#include "low_rank.h"

namespace {

#if defined(__AVX512F__)
static constexpr int kTall = 6, kWide = 4;  // rows, and vectors of a row, whose sums are held in registers at once
#else
static constexpr int kTall = 6, kWide = 2;
#endif
static constexpr int kPackedRank = 256;

// out[r][0..C * W) of R rows, `stride` elements apart, from column j of right on.
template <int R, int C>
PF_INLINE void form_block(const float* left, const float* right, int rank, int64_t columns, float* out, int64_t stride) {
  vf sums[R][C] = {};
  for (int k = 0; k < rank; ++k, right += columns) {
    vf x[C];
    for (int c = 0; c < C; ++c) x[c] = load_raw<vf>(right + c * W);
    for (int r = 0; r < R; ++r) {
      const vf l = splat(left[int64_t(r) * rank + k]);
      for (int c = 0; c < C; ++c) sums[r][c] = fused(l, x[c], sums[r][c]);
    }
  }
  for (int r = 0; r < R; ++r) memcpy(out + r * stride, sums[r], sizeof sums[r]);
}

PF_INLINE void form_rest(const float* left, const float* right, int rank, int64_t columns, int n, float* out) {
  for (int j = 0; j < n; ++j) {
    float sum = 0.0f;
    for (int k = 0; k < rank; ++k) sum = fused(left[k], right[int64_t(k) * columns + j], sum);
    out[j] = sum;
  }
}

// Columns [begin, end) of one row.
PF_INLINE void form_row(const Factors& f, int64_t row, int64_t begin, int64_t end, float* out) {
  const float *left = (const float*)f.left + row * f.rank, *right = (const float*)f.right;
  int64_t j = begin;
  for (; j + 8 * W <= end; j += 8 * W) form_block<1, 8>(left, right + j, f.rank, f.columns, out + (j - begin), 0);
  for (; j + W <= end; j += W) form_block<1, 1>(left, right + j, f.rank, f.columns, out + (j - begin), 0);
  form_rest(left, right + j, f.rank, f.columns, int(end - j), out + (j - begin));
}

// Whole rows [begin, end): columns outside, so that each part of right is read from the first-level cache.
PF_INLINE void form_rows(const Factors& f, int64_t begin, int64_t end, float* out) {
  const float *left = (const float*)f.left, *right = (const float*)f.right;
  const int64_t columns = f.columns;
  alignas(64) float packed[kPackedRank * kWide * W];  // rows of a power of two apart would share the cache's few sets
  const bool packs = f.rank <= kPackedRank && end - begin > kTall;
  int64_t j = 0;
  for (; j + kWide * W <= columns; j += kWide * W) {
    const float* part = right + j;
    int64_t stride = columns;
    if (packs) {
      for (int k = 0; k < f.rank; ++k) memcpy(packed + k * kWide * W, part + k * columns, kWide * W * sizeof(float));
      part = packed, stride = kWide * W;
    }
    int64_t i = begin;
    for (; i + kTall <= end; i += kTall)
      form_block<kTall, kWide>(left + i * f.rank, part, f.rank, stride, out + (i - begin) * columns + j, columns);
    for (; i < end; ++i)
      form_block<1, kWide>(left + i * f.rank, part, f.rank, stride, out + (i - begin) * columns + j, columns);
  }
  for (int64_t i = begin; i < end && j < columns; ++i) form_row(f, i, j, columns, out + (i - begin) * columns + j);
}

PF_INLINE void add_origin(const Factors& f, int64_t begin, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    const vf sum = load((const void*)f.origin, f.origin_dtype, begin + i) + load_raw<vf>(out + i);
    memcpy(out + i, &sum, sizeof sum);
  }
  for (; i < n; ++i) {
    float one;
    if (f.origin_dtype == kF32) {
      one = load_raw<float>((const float*)f.origin + begin + i);
    } else {
      const uint16_t h = load_raw<uint16_t>((const uint16_t*)f.origin + begin + i);
      const uint32_t u = uint32_t(h) << 16;
      if (f.origin_dtype == kF16) one = half_to_float(h);
      else memcpy(&one, &u, 4);
    }
    out[i] = one + out[i];
  }
}

PF_INLINE void form_tile(const Factors& f, int64_t begin, int64_t n, float* out) {
  if (n <= 0) return;
  const int64_t start = f.first + begin, stop = start + n, columns = f.columns;
  const int64_t row = start / columns, last = (stop - 1) / columns;
  if (row == last) {
    form_row(f, row, start - row * columns, stop - row * columns, out);
  } else {
    const int64_t whole = start % columns ? row + 1 : row, end = stop % columns ? last : last + 1;
    if (whole > row) form_row(f, row, start - row * columns, columns, out);
    form_rows(f, whole, end, out + (whole * columns - start));
    if (end == last) form_row(f, last, 0, stop - last * columns, out + (last * columns - start));
  }
  if (f.origin) add_origin(f, start, n, out);
}

}  // namespace
