// The C interface of sums over task vectors on a device.
#include "kernels.h"

// Sums of [count, width] fp64 over the first dimension by the fixed tree, into sums [width]. scratch:
// [ceil(count / 2048), width]; both are overwritten.
PETA_EXPORT int32_t peta_tree_sums(Place place, double* values, int64_t count, int32_t width, double* scratch,
                                   double* sums) {
  const char* const who = "tree_sum";
  if (const int failed = peta::enter(place, who)) return failed;
  if (count <= 0) return peta::clear(sums, width * 8, place, who);
  double *from = values, *to = scratch;
  for (;;) {
    const int64_t chunks = peta::ceil_div(count, peta::kTreeWidth);
    double* const target = chunks == 1 ? sums : to;
    if (const int failed = peta::launch(peta::TreeStep{from, target, count, width}, chunks * width, place, who))
      return failed;
    if (chunks == 1) return 0;
    double* const spent = from;
    from = to, to = spent, count = chunks;
  }
}

// All on the device. deltas [T]; partials [ceil(size / 4096), width], width = 2 T + T (T + 1) / 2; scratch as above;
// counts: nonfinite [T], nonzero [T], conflicts [T (T - 1) / 2], any [1]; largest [T].
PETA_EXPORT int32_t peta_task_statistics(Place place, const Delta* deltas, int32_t tasks, int64_t size, double* partials,
                                         double* scratch, double* sums, int64_t* counts, uint32_t* largest) {
  const char* const who = "task_statistics";
  using namespace peta;
  if (const int failed = enter(place, who)) return failed;
  const int32_t width = 2 * tasks + tasks * (tasks + 1) / 2, pairs = tasks * (tasks - 1) / 2;
  const int32_t kinds = tasks + pairs + 1;
  int failed = clear(counts, (2 * tasks + pairs + 1) * 8, place, who);
  if (!failed) failed = clear(largest, tasks * 4, place, who);
  if (size > 0 && tasks > 0) {
    const int32_t sum_groups = int32_t(ceil_div(width, kSumWarps)), groups = int32_t(ceil_div(kinds, kSumWarps));
    const int64_t blocks = ceil_div(size, kStatisticsBlock), tiles = ceil_div(size, kCountTile);
    const BlockSums block_sums{deltas, partials, size, tasks, width, sum_groups};
    if (!failed) failed = launch(block_sums, blocks * sum_groups, place, who);
    const CountSigns count_signs{deltas, counts, largest, size, tasks, kinds, groups};
    if (!failed) failed = launch(count_signs, tiles * groups, place, who);
  }
  return failed ? failed : peta_tree_sums(place, partials, ceil_div(size, kStatisticsBlock), width, scratch, sums);
}

// *count (device) = set bits, or bytes that are not zero, of a mask of `size` elements.
PETA_EXPORT int32_t peta_count_mask(Place place, const uint8_t* mask, int64_t size, int32_t bits, int64_t* count) {
  const char* const who = "count_mask";
  using namespace peta;
  int failed = enter(place, who);
  if (!failed) failed = clear(count, 8, place, who);
  return failed ? failed : launch(CountMask{mask, count, size, bits}, ceil_div(size, kCountTile), place, who);
}
