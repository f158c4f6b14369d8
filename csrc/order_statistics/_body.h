// The two loops, once. A variant file defines PETA_VARIANT and includes this.
#include "order_statistics.h"

#include "../delta_load.h"

extern "C" void PETA_JOIN(peta_magnitude_block_, PETA_VARIANT)(const Delta& delta, int64_t begin, int n,
                                                               uint32_t* out) {
  stage_delta(delta, begin, n, (float*)out);
  for (int i = 0; i < n; ++i) out[i] &= kAbsMask;
}

namespace {

constexpr int kAhead = 1024;  // elements of 2 bytes; half a page, where the hardware's own prefetching ends

// Counts the lanes from the bracket's low end up and appends those within it, ends included, without a branch on the
// data: at a few percent of all elements it would be mispredicted too often.
PF_INLINE void count_vector(vi a, vi under_low, vi high, uint32_t& from_low, uint32_t*& within) {
  const vm from = gt(a, under_low);
  from_low += __builtin_popcount(lanes(from));
  within += compress(within, a, lanes(at_most_where(from, a, high)));
}

// Takes the ends of the bracket out of the values within it and counts them; what is left stays, in place.
PF_INLINE void take_out_ends(uint32_t* values, int64_t n, const Bracket& bracket, BlockCount& count) {
  uint32_t* kept = values;
  for (int64_t i = 0; i < n; i += W) {
    const vi a = load_raw<vi>(values + i);
    const uint32_t real = n - i >= W ? (1u << W) - 1u : (1u << (n - i)) - 1u;
    const uint32_t high = lanes(eq(a, splat_i(bracket.high))) & real;
    const uint32_t low = lanes(eq(a, splat_i(bracket.low))) & real & ~high;
    count.equal_high += __builtin_popcount(high);
    count.equal_low += __builtin_popcount(low);
    kept += compress(kept, a, real & ~high & ~low);
  }
  count.inside = uint32_t(kept - values);
}

PF_INLINE bool both_bf16(const Delta& d) {
  return d.dtype == kBF16 && d.base_dtype == kBF16 && d.base_kind == kBaseTensor && !d.is_delta;
}

// Elements [i, n) of the block, of any dtypes.
PF_INLINE void count_rest(const Delta& delta, int64_t begin, int i, int n, vi under_low, vi high, uint32_t& from_low,
                          uint32_t*& within) {
  for (; i + W <= n; i += W)
    count_vector(abs_bits(load_delta(delta, begin + i)), under_low, high, from_low, within);
  if (i < n) {
    float rest[W];
    stage_delta(delta, begin + i, n - i, rest);
    const vi a = abs_bits(load_raw<vf>(rest)), below_all = splat_i(-1);
    count_vector(select(gt(splat_i(n - i), iota()), a, below_all), under_low, high, from_low, within);
  }
}

// kTogether brackets of bf16 tensors that share their base, vector by vector, so that all of them are read side by side
// and the base once; with one, any dtypes.
template <int kTogether>
void count_together(Counting* counting, int64_t begin, int n) {
  vi under_low[kTogether], high[kTogether];
  const uint16_t* x[kTogether];
  uint32_t* within[kTogether];
  uint32_t from_low[kTogether] = {};
  for (int k = 0; k < kTogether; ++k) {
    const Counting& c = counting[k];
    under_low[k] = splat_i(int32_t(c.bracket.low) - 1), high[k] = splat_i(c.bracket.high);
    x[k] = (const uint16_t*)c.delta->x + begin, within[k] = c.inside;
  }
  const uint16_t* const base = (const uint16_t*)counting->delta->base + begin;
  int i = 0;
  if (kTogether > 1 || both_bf16(*counting->delta)) {
    for (; i + 2 * W <= n; i += 2 * W) {  // even and odd elements: within a block their order does not matter
      vf base_even, base_odd;
      prefetch(base + i + kAhead);
      load_bf16_pair(base + i, base_even, base_odd);
      for (int k = 0; k < kTogether; ++k) {
        vf x_even, x_odd;
        prefetch(x[k] + i + kAhead);
        load_bf16_pair(x[k] + i, x_even, x_odd);
        count_vector(abs_bits(x_even - base_even), under_low[k], high[k], from_low[k], within[k]);
        count_vector(abs_bits(x_odd - base_odd), under_low[k], high[k], from_low[k], within[k]);
      }
    }
  }
  for (int k = 0; k < kTogether; ++k) {
    Counting& c = counting[k];
    alignas(64) float tile[kTogether == 1 ? kTile : 1];
    const Delta delta = kTogether == 1 ? formed(*c.delta, begin, n, tile) : *c.delta;
    count_rest(delta, begin, i, n, under_low[k], high[k], from_low[k], within[k]);
    c.count = BlockCount{};
    c.count.above = from_low[k] - uint32_t(within[k] - c.inside);
    take_out_ends(c.inside, within[k] - c.inside, c.bracket, c.count);
  }
}

}  // namespace

extern "C" void PETA_JOIN(peta_count_block_, PETA_VARIANT)(Counting* counting, int num, int64_t begin, int n) {
  for (int k = 0; k < num;) {
    int together = 1;
    if (both_bf16(*counting[k].delta))
      while (together < 4 && k + together < num && both_bf16(*counting[k + together].delta) &&
             counting[k + together].delta->base == counting[k].delta->base)
        ++together;
    Counting* first = counting + k;
    if (together == 4) count_together<4>(first, begin, n);
    else if (together == 3) count_together<3>(first, begin, n);
    else if (together == 2) count_together<2>(first, begin, n);
    else count_together<1>(first, begin, n);
    k += together;
  }
}
