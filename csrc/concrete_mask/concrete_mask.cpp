#include "concrete_mask.h"

#include <algorithm>
#include <vector>

#include "../cpu.h"
#include "../pool.h"
#include "../task_statistics/task_statistics.h"

namespace {

constexpr int64_t kBlocksAGrain = 4;
constexpr int kRoom = kMaskBlock + 64;

MaskBlock variant() {
#if defined(PETA_X86_VARIANTS)
  if (simd_level() == kAvx512) return peta_concrete_mask_avx512;
  if (simd_level() == kAvx2) return peta_concrete_mask_avx2;
#endif
  return peta_concrete_mask_baseline;
}

struct Worker {
  std::vector<uint32_t> words = std::vector<uint32_t>(kRoom);
  std::vector<float> floats = std::vector<float>(3 * kRoom);

  MaskScratch view() {
    float* f = floats.data();
    return {words.data(), f, f + kRoom, f + 2 * kRoom};
  }
};

int sums_of(MaskMode mode, const MaskTensor& t) {
  return mode == kMaskMean ? 1 : mode == kMaskReduce ? t.tasks : 0;
}

int64_t blocks_of(const MaskTensor& t) { return (t.size + kMaskBlock - 1) / kMaskBlock; }

}  // namespace

void concrete_mask(MaskMode mode, const MaskTensor* tensors, int64_t num_tensors, const MaskTask* tasks,
                   const MaskSettings& settings, double* sums, int threads) {
  std::vector<int64_t> first_grain(num_tensors + 1, 0), first_partial(num_tensors + 1, 0);
  for (int64_t i = 0; i < num_tensors; ++i) {
    first_grain[i + 1] = first_grain[i] + (blocks_of(tensors[i]) + kBlocksAGrain - 1) / kBlocksAGrain;
    first_partial[i + 1] = first_partial[i] + blocks_of(tensors[i]) * sums_of(mode, tensors[i]);
  }
  const int64_t grains = first_grain[num_tensors];
  if (threads <= 0) threads = default_threads();
  threads = int(std::clamp<int64_t>(grains, 1, threads));
  std::vector<double> partial(size_t(first_partial[num_tensors]));
  std::vector<Worker> workers(threads);
  const MaskBlock run = variant();
  parallel_for(grains, threads, [&](int64_t grain, int worker) {
    const int64_t i = std::upper_bound(first_grain.begin(), first_grain.end(), grain) - first_grain.begin() - 1;
    const MaskTensor& t = tensors[i];
    const int64_t first = (grain - first_grain[i]) * kBlocksAGrain;
    const MaskScratch scratch = workers[worker].view();
    for (int64_t block = first; block < std::min(first + kBlocksAGrain, blocks_of(t)); ++block) {
      const int64_t begin = block * kMaskBlock;
      run(mode, t, tasks, settings, begin, int(std::min<int64_t>(kMaskBlock, t.size - begin)), scratch,
          partial.data() + first_partial[i] + block * sums_of(mode, t));
    }
  });
  for (int64_t i = 0; i < num_tensors; ++i) {
    const int width = sums_of(mode, tensors[i]);
    for (int k = 0; k < width; ++k)
      sums[tensors[i].first_sum + k] = tree_sum(partial.data() + first_partial[i] + k, blocks_of(tensors[i]), width);
  }
}
