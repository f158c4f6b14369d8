// The two loops, once. A variant file defines PETA_VARIANT and includes this.
#include "order_statistics.h"

#include "../delta_load.h"

extern "C" void PETA_JOIN(peta_magnitude_block_, PETA_VARIANT)(const Delta& delta, int64_t begin, int n,
                                                               uint32_t* out) {
  stage_delta(delta, begin, n, (float*)out);
  for (int i = 0; i < n; ++i) out[i] &= kAbsMask;
}

namespace {

// Counts the lanes above the bracket and appends those within it, ends included, without a branch on the data: at a few
// percent of all elements it would be mispredicted too often.
PF_INLINE void count_vector(vi a, uint32_t real, const Bracket& bracket, uint32_t& above, uint32_t*& within) {
  const uint32_t over = lanes(gt(a, splat_i(bracket.high))), from_low = lanes(gt(a, splat_i(int32_t(bracket.low) - 1)));
  above += __builtin_popcount(over & real);
  within += compress(within, a, from_low & ~over & real);
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

}  // namespace

extern "C" void PETA_JOIN(peta_count_block_, PETA_VARIANT)(const Delta& given, int64_t begin, int n,
                                                           const Bracket& given_bracket, BlockCount& result,
                                                           uint32_t* inside) {
  alignas(64) float tile[kTile];
  const Delta delta = formed(given, begin, n, tile);
  const Bracket bracket = given_bracket;
  constexpr uint32_t kAll = (1u << W) - 1u;
  const int whole = n / W * W;
  BlockCount count{};
  uint32_t* within = inside;
  int i = 0;
  if (delta.dtype == kBF16 && delta.base_dtype == kBF16 && delta.base_kind == kBaseTensor && !delta.is_delta) {
    const uint16_t *x = (const uint16_t*)delta.x + begin, *base = (const uint16_t*)delta.base + begin;
    for (; i + 2 * W <= whole; i += 2 * W) {  // even and odd elements: within a block their order does not matter
      vf x_even, x_odd, base_even, base_odd;
      prefetch_l2(x + i + kSelectBlock), prefetch_l2(base + i + kSelectBlock);  // other tasks' blocks are read in between
      load_bf16_pair(x + i, x_even, x_odd);
      load_bf16_pair(base + i, base_even, base_odd);
      count_vector(abs_bits(x_even - base_even), kAll, bracket, count.above, within);
      count_vector(abs_bits(x_odd - base_odd), kAll, bracket, count.above, within);
    }
  }
  for (; i < whole; i += W) count_vector(abs_bits(load_delta(delta, begin + i)), kAll, bracket, count.above, within);
  if (whole < n) {
    float rest[W];
    stage_delta(delta, begin + whole, n - whole, rest);
    count_vector(abs_bits(load_raw<vf>(rest)), (1u << (n - whole)) - 1u, bracket, count.above, within);
  }
  take_out_ends(inside, within - inside, bracket, count);
  result = count;
}
