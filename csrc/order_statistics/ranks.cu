// The C interface of ranks within rows, of histograms, and of thresholds that stay on the device.
#include "../delta_merge/delta_merge.h"
#include "order_statistics.h"
#include "rank_kernels.h"

// A threshold of a task record that a selection finds on the device.
struct RankRef {
  uint64_t query;  // address of its SelectQuery
  int64_t task;    // place of the record
  int64_t first;   // flat index of the block that the selection is of
  int32_t high;    // 1: the record's upper threshold
  int32_t all;     // 1: all equals belong
};

namespace peta {

struct SetThresholds {
  static constexpr int kThreads = 128, kBlocks = 4, kPhases = 1;
  struct Shared {
    int32_t unused;
  };
  Task* tasks;
  const RankRef* refs;
  int64_t count;

  template <int>
  PF_HD void phase(Shared&, const Block& block) const {
    const int64_t i = block.index * kThreads + block.thread;
    if (i >= count) return;
    const RankRef ref = refs[i];
    const SelectQuery& q = *reinterpret_cast<const SelectQuery*>(ref.query);
    const int64_t last = ref.all || q.last_index == INT64_MAX ? INT64_MAX : ref.first + q.last_index;
    Task& task = tasks[ref.task];
    if (ref.high) task.high = q.threshold, task.high_index = last;
    else task.low = q.threshold, task.low_index = last;
  }
};

}  // namespace peta

// Everything on the device.
PETA_EXPORT int32_t peta_set_thresholds(Place place, Task* tasks, const RankRef* refs, int64_t count) {
  const int failed = peta::enter(place, "delta_merge");
  if (failed) return failed;
  return peta::launch(peta::SetThresholds{tasks, refs, count}, peta::ceil_div(count, 128), place, "delta_merge");
}

// bins: uint64 [65536] on the device, added to; with a prefix >= 0, [32768].
PETA_EXPORT int32_t peta_histogram(Place place, const Delta* delta, int64_t size, int32_t prefix, uint64_t* bins) {
  if (const int failed = peta::enter(place, "order_statistics")) return failed;
  if (size <= 0) return 0;
  const int64_t blocks = peta::smaller(peta::ceil_div(size, 1 << 14), peta::full_grid(place, 4));
  const int64_t each = peta::ceil_div(size, blocks);
  if (each > UINT32_MAX) return peta::fail(-1, "order_statistics", "more elements than a histogram can count");
  return peta::launch(peta::Histogram{*delta, size, each, bins, prefix}, blocks, place, "order_statistics");
}

// Bytes of keys that peta_ranked_probability wants for each row.
PETA_EXPORT int64_t peta_row_bytes(int64_t columns) {
  if (columns <= peta::kShortRow) return 8;
  int64_t padded = peta::kSorted;
  while (padded < columns) padded *= 2;
  return padded * 8;
}

// delta on the host, keys and out [rows, columns] on the device.
PETA_EXPORT int32_t peta_ranked_probability(Place place, const Delta* delta, int64_t begin_row, int64_t rows,
                                            int64_t columns, double low, double high, uint64_t* keys, float* out) {
  const char* const who = "ranked_probability";
  using namespace peta;
  if (const int failed = enter(place, who)) return failed;
  if (rows <= 0) return 0;
  if (columns > UINT32_MAX) return fail(-1, who, "a row has more elements than its ranks can number");
  const int64_t padded = peta_row_bytes(columns) / 8;
  const RankRows r{*delta, begin_row, rows, columns, padded, keys};
  if (columns <= kShortRow)
    return launch(RankShortRows{r, low, high - low, out}, ceil_div(rows * columns, 256), place, who);
  const int64_t runs = rows * (padded / kSorted);
  int failed = launch(SortRuns{r}, runs, place, who);
  for (int64_t k = 2 * kSorted; k <= padded && !failed; k *= 2) {
    for (int64_t j = k / 2; j >= kSorted && !failed; j /= 2)
      failed = launch(SortStage{r, k, j}, ceil_div(rows * (padded / 2), SortStage::kThreads), place, who);
    if (!failed) failed = launch(SortEnds{r, k}, runs, place, who);
  }
  if (failed) return failed;
  return launch(RankToProbability{r, low, high - low, out}, ceil_div(rows * columns, 256), place, who);
}
