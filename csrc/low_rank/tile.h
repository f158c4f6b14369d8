// The loops that form elements of a low-rank product, for variant files.
#pragma once
#include <algorithm>

#include "../simd.h"
#include "low_rank.h"

namespace {

#if defined(__AVX512F__)
static constexpr int kTall = 6, kWide = 4;  // rows, and vectors of a row, whose sums are held in registers at once
#else
static constexpr int kTall = 6, kWide = 2;
#endif
static_assert(kPanel % (kWide * W) == 0, "a panel is a whole number of blocks");

static constexpr int32_t kNoOrigin = -1;

// out[r][0..kPanel) of R rows, `stride` elements apart: origin[r], as far apart, and the product. The next panel and the
// origin are on their way to the cache meanwhile.
template <int R, int32_t kOrigin>
PF_INLINE void form_block(const float* left, const float* panel, int rank, const uint8_t* origin, float* out,
                          int64_t stride) {
  constexpr int64_t kItem = kOrigin == kF32 ? 4 : 2;
  for (int r = 0; r < R && kOrigin != kNoOrigin; ++r)
    for (int at = 0; at <= kPanel * kItem; at += 64) prefetch(origin + r * stride * kItem + at);
  for (int j = 0; j < kPanel; j += kWide * W) {
    vf sums[R][kWide] = {};
    const float* x = panel + j;
    for (int k = 0; k < rank; ++k, x += kPanel) {
      vf right[kWide];
      for (int c = 0; c < kWide; ++c) right[c] = load_raw<vf>(x + c * W);
      for (int at = 0; at < kWide * W; at += 16) prefetch(x + int64_t(rank) * kPanel + at);
      for (int r = 0; r < R; ++r) {
        const vf l = splat(left[int64_t(r) * rank + k]);
        for (int c = 0; c < kWide; ++c) sums[r][c] = fused(l, right[c], sums[r][c]);
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int c = 0; c < kWide; ++c) {
        const int64_t at = r * stride + j + c * W;
        if constexpr (kOrigin != kNoOrigin) sums[r][c] = load((const void*)origin, kOrigin, at) + sums[r][c];
        memcpy(out + at, &sums[r][c], sizeof(vf));
      }
    }
  }
}

// A panel's part of some rows.
template <int32_t kOrigin, int R = kTall>
PF_INLINE void form_rows(const float* left, const float* panel, int64_t rows, int rank, const uint8_t* origin, float* out,
                         int64_t stride) {
  constexpr int64_t kItem = kOrigin == kF32 ? 4 : 2;
  for (; rows >= R; rows -= R, left += int64_t(R) * rank, out += R * stride) {
    form_block<R, kOrigin>(left, panel, rank, origin, out, stride);
    if (kOrigin != kNoOrigin) origin += R * stride * kItem;
  }
  if constexpr (R > 1) form_rows<kOrigin, R - 1>(left, panel, rows, rank, origin, out, stride);
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

// Columns [from, to) of the panel that begins with column j, of one row.
PF_INLINE void form_part(const Factors& f, int64_t row, int64_t j, int64_t from, int64_t to, float* out) {
  alignas(64) float whole[kPanel];
  const float* const panel = (const float*)f.right + j * f.rank;
  form_block<1, kNoOrigin>((const float*)f.left + row * f.rank, panel, f.rank, nullptr, whole, kPanel);
  memcpy(out, whole + (from - j), size_t(to - from) * sizeof(float));
  if (f.origin) add_origin(f, row * f.columns + from, to - from, out);
}

// Elements [start, stop) of the tensor. Panels outside, so that each is read from the first-level cache; the first and
// the last row may want a part of one, and the last panel may be narrower than it is stored.
template <int32_t kOrigin>
PF_INLINE void form_run(const Factors& f, int64_t start, int64_t stop, float* out) {
  const int64_t columns = f.columns, first = start / columns, last = (stop - 1) / columns;
  const int64_t head = start - first * columns, tail = stop - last * columns;  // the first row from, the last row up to
  const auto place = [&](int64_t row, int64_t column) { return out + ((row - first) * columns + column - head); };
  const int64_t past = first == last ? tail : columns;
  for (int64_t j = first == last ? head / kPanel * kPanel : 0; j < past; j += kPanel) {
    const float* const panel = (const float*)f.right + j * f.rank;
    const int64_t next = std::min(j + kPanel, columns);
    int64_t begin = first, end = last + 1;
    const auto part = [&](int64_t row) {
      const int64_t from = row == first ? std::max(j, head) : j, to = row == last ? std::min(next, tail) : next;
      if (from < to) form_part(f, row, j, from, to, place(row, from));
    };
    if (next - j < kPanel) {
      for (int64_t row = first; row <= last; ++row) part(row);
      continue;
    }
    if (head > j) part(begin++);
    if (tail < next && end > begin) part(--end);
    const uint8_t* const origin = (const uint8_t*)f.origin + (begin * columns + j) * itemsize(f.origin_dtype);
    form_rows<kOrigin>((const float*)f.left + begin * f.rank, panel, end - begin, f.rank, origin, place(begin, j), columns);
  }
}

PF_INLINE void form_tile(const Factors& f, int64_t begin, int64_t n, float* out) {
  if (n <= 0) return;
  const int64_t start = f.first + begin, stop = start + n;
  if (!f.origin) return form_run<kNoOrigin>(f, start, stop, out);
  const int64_t item = itemsize(f.origin_dtype);
  for (int64_t at = start * item; at < stop * item; at += 4096) {  // maps its pages: an unmapped one cannot be prefetched
    const volatile uint8_t touched = *((const uint8_t*)f.origin + at);
    (void)touched;
  }
  if (f.origin_dtype == kBF16) form_run<kBF16>(f, start, stop, out);
  else if (f.origin_dtype == kF16) form_run<kF16>(f, start, stop, out);
  else form_run<kF32>(f, start, stop, out);
}

}  // namespace
