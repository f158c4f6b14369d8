#include "task_statistics.h"

#include <algorithm>
#include <vector>

#include "../cpu.h"
#include "../pool.h"

namespace {

constexpr int64_t kBlocksAGrain = 16;

StatisticsOfBlock variant() {
#if defined(PETA_X86_VARIANTS)
  if (simd_level() == kAvx512) return peta_task_statistics_avx512;
  if (simd_level() == kAvx2) return peta_task_statistics_avx2;
#endif
  return peta_task_statistics_baseline;
}

struct Worker {
  std::vector<float> scratch;
  std::vector<int64_t> counts;
  std::vector<uint32_t> largest;

  explicit Worker(int tasks)
      : scratch(size_t(tasks) * (kStatisticsBlock + 16)), counts(2 * tasks + tasks * (tasks - 1) / 2 + 1),
        largest(tasks) {}

  StatisticsCounts view(int tasks) {
    int64_t* c = counts.data();
    return {c, c + tasks, c + 2 * tasks, &counts.back(), largest.data()};
  }
};

}  // namespace

double tree_sum(double* values, int64_t count, int64_t stride) {
  if (count == 0) return 0.0;
  for (; count > 1; count = (count + 1) / 2)
    for (int64_t i = 0; i < count; i += 2)
      values[i / 2 * stride] = i + 1 < count ? values[i * stride] + values[(i + 1) * stride] : values[i * stride];
  return values[0];
}

void task_statistics(const Delta* deltas, int tasks, int64_t size, double* sums, const StatisticsCounts& counts,
                     int threads) {
  const int width = 2 * tasks + tasks * (tasks + 1) / 2, pairs = tasks * (tasks - 1) / 2;
  const int64_t blocks = (size + kStatisticsBlock - 1) / kStatisticsBlock;
  const int64_t grains = (blocks + kBlocksAGrain - 1) / kBlocksAGrain;
  if (threads <= 0) threads = default_threads();
  threads = int(std::clamp<int64_t>(grains, 1, threads));
  std::vector<double> partial(size_t(blocks) * width);
  std::vector<Worker> workers;
  for (int i = 0; i < threads; ++i) workers.emplace_back(tasks);
  const StatisticsOfBlock of_block = variant();
  parallel_for(grains, threads, [&](int64_t grain, int worker) {
    Worker& mine = workers[worker];
    const int64_t last = std::min((grain + 1) * kBlocksAGrain, blocks);
    for (int64_t block = grain * kBlocksAGrain; block < last; ++block) {
      const int64_t begin = block * kStatisticsBlock;
      of_block(deltas, tasks, begin, int(std::min<int64_t>(kStatisticsBlock, size - begin)), &partial[block * width],
               mine.view(tasks), mine.scratch.data());
    }
  });
  for (int i = 0; i < width; ++i) sums[i] = blocks ? tree_sum(partial.data() + i, blocks, width) : 0.0;
  std::fill_n(counts.nonfinite, tasks, 0), std::fill_n(counts.nonzero, tasks, 0);
  std::fill_n(counts.conflicts, pairs, 0), std::fill_n(counts.largest, tasks, 0);
  *counts.any_conflict = 0;
  for (Worker& w : workers) {
    const StatisticsCounts c = w.view(tasks);
    for (int t = 0; t < tasks; ++t) {
      counts.nonfinite[t] += c.nonfinite[t], counts.nonzero[t] += c.nonzero[t];
      counts.largest[t] = std::max(counts.largest[t], c.largest[t]);
    }
    for (int p = 0; p < pairs; ++p) counts.conflicts[p] += c.conflicts[p];
    *counts.any_conflict += *c.any_conflict;
  }
}
