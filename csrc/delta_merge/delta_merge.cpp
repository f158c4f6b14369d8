#include "delta_merge.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "../cpu.h"
#include "../low_rank/low_rank.h"
#include "../pool.h"

namespace {

constexpr int64_t kGrain = 16 * kBlock;  // elements a worker pulls at once

DeltaMergeRange variant() {
#if defined(PETA_X86_VARIANTS)
  if (simd_level() == kAvx512) return peta_delta_merge_avx512;
  if (simd_level() == kAvx2) return peta_delta_merge_avx2;
#endif
  return peta_delta_merge_baseline;
}

// One allocation a worker, every array on a cache line of its own.
class Workspace {
 public:
  explicit Workspace(int tasks) {
    size_t at = 0;
    auto take = [&](size_t bytes) {
      const size_t here = at;
      at += (bytes + 63) / 64 * 64;
      return here;
    };
    const size_t row = kRow * sizeof(float), rows = row * tasks;
    const size_t offsets[] = {take(rows), take(rows), take(rows), take(rows), take(rows), take(row), take(row), take(row),
                              take(size_t(tasks) * 64), take(size_t(tasks) * 64 * sizeof(double)),
                              take(size_t(tasks) * sizeof(View))};
    memory_.reset(static_cast<uint8_t*>(std::aligned_alloc(64, at)));
    if (!memory_) throw std::bad_alloc();
    uint8_t* m = memory_.get();
    auto f = [&](int i) { return reinterpret_cast<float*>(m + offsets[i]); };
    scratch = {f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7), f(8), reinterpret_cast<double*>(m + offsets[9]),
               reinterpret_cast<View*>(m + offsets[10])};
  }
  Scratch scratch;

  // The piece with its tasks' low-rank factors formed, for elements [begin, end), in memory of this worker.
  Piece formed(const Piece& given, const Task*& tasks, int64_t begin, int64_t end, FormFactors form) {
    Piece piece = given;
    const Task* first = tasks + given.first_task;
    const auto is_formed = [](const Task& t) { return t.dtype == kFactors; };
    const int64_t count = std::count_if(first, first + given.tasks, is_formed);
    if (!count) return piece;
    tasks_.assign(first, first + given.tasks);
    tiles_.resize(size_t(count) * kGrain);
    float* tile = tiles_.data();
    for (Task& t : tasks_) {
      if (!is_formed(t)) continue;
      form(*reinterpret_cast<const Factors*>(t.x), begin, end - begin, tile);
      t.x = reinterpret_cast<uint64_t>(tile) - uint64_t(begin) * sizeof(float);
      t.dtype = kF32;
      tile += kGrain;
    }
    tasks = tasks_.data();
    piece.first_task = 0;
    return piece;
  }

 private:
  std::vector<Task> tasks_;
  std::vector<float> tiles_;
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<uint8_t, Free> memory_;
};

}  // namespace

void delta_merge(Mode mode, Piece* pieces, int64_t num_pieces, const Task* tasks, const Rule* rules, int threads) {
  if (threads <= 0) threads = default_threads();
  std::vector<int64_t> first_grain(num_pieces + 1, 0);
  int most_tasks = 1;
  for (int64_t i = 0; i < num_pieces; ++i) {
    first_grain[i + 1] = first_grain[i] + (pieces[i].size + kGrain - 1) / kGrain;
    most_tasks = std::max(most_tasks, pieces[i].tasks);
    pieces[i].nonfinite = 0, pieces[i].sign_total = 0;
  }
  const int64_t grains = first_grain[num_pieces];
  if (threads > grains) threads = int(std::max<int64_t>(1, grains));
  std::vector<Workspace> workspaces;
  for (int i = 0; i < threads; ++i) workspaces.emplace_back(most_tasks);
  const DeltaMergeRange run = variant();
  const FormFactors form = form_factors();
  parallel_for(grains, threads, [&](int64_t grain, int worker) {
    const int64_t i = std::upper_bound(first_grain.begin(), first_grain.end(), grain) - first_grain.begin() - 1;
    const int64_t begin = (grain - first_grain[i]) * kGrain, end = std::min(begin + kGrain, pieces[i].size);
    const Task* own = tasks;
    Piece piece = workspaces[worker].formed(pieces[i], own, begin, end, form);
    uint32_t nonfinite = 0;
    int64_t signs = 0;
    run(mode, piece, own, rules[piece.rule], begin, end, workspaces[worker].scratch, &nonfinite, &signs);
    if (nonfinite) __atomic_fetch_or(&pieces[i].nonfinite, nonfinite, __ATOMIC_RELAXED);
    if (signs) __atomic_fetch_add(&pieces[i].sign_total, signs, __ATOMIC_RELAXED);
  });
}
