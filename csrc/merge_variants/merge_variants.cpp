#include "merge_variants.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "../cpu.h"
#include "../pool.h"

namespace {

constexpr int64_t kGrain = 16 * kBlock;  // elements a worker pulls at once

MergeVariantsRange variant_of_this_cpu() {
#if defined(PETA_X86_VARIANTS)
  if (simd_level() == kAvx512) return peta_merge_variants_avx512;
  if (simd_level() == kAvx2) return peta_merge_variants_avx2;
#endif
  return peta_merge_variants_baseline;
}

// One allocation a worker, every array on a cache line of its own.
class Workspace {
 public:
  Workspace(size_t terms, size_t uses, size_t variants) {
    const size_t row = (kRow * sizeof(float) + 63) / 64 * 64;
    const size_t sizes[] = {row * terms, row * terms, row * terms, row * terms, row * terms, row, row, row, row,
                            uses * 64, terms * sizeof(TermView), variants * sizeof(Way)};
    size_t offsets[12], at = 0;
    for (int i = 0; i < 12; ++i) offsets[i] = at, at += (sizes[i] + 63) / 64 * 64;
    memory_.reset(static_cast<uint8_t*>(std::aligned_alloc(64, at)));
    if (!memory_) throw std::bad_alloc();
    auto f = [&](int i) { return reinterpret_cast<float*>(memory_.get() + offsets[i]); };
    scratch = {f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7), f(8), f(9),
               reinterpret_cast<TermView*>(memory_.get() + offsets[10]), reinterpret_cast<Way*>(memory_.get() + offsets[11])};
  }
  VariantScratch scratch;

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<uint8_t, Free> memory_;
};

}  // namespace

void merge_variants(const VariantGroup* groups, int64_t num_groups, const Task* terms, Variant* variants,
                    const Use* uses, const Rule* rules, int threads) {
  if (threads <= 0) threads = default_threads();
  std::vector<int64_t> first_grain(num_groups + 1, 0);
  int most_terms = 1, most_uses = 1, most_variants = 1;
  for (int64_t i = 0; i < num_groups; ++i) {
    const VariantGroup& g = groups[i];
    first_grain[i + 1] = first_grain[i] + (g.size + kGrain - 1) / kGrain;
    most_terms = std::max(most_terms, g.terms);
    most_variants = std::max(most_variants, g.variants);
    for (int64_t v = g.first_variant; v < g.first_variant + g.variants; ++v)
      most_uses = std::max(most_uses, variants[v].uses), variants[v].nonfinite = 0;
  }
  const int64_t grains = first_grain[num_groups];
  if (threads > grains) threads = int(std::max<int64_t>(1, grains));
  std::vector<Workspace> workspaces;
  std::vector<std::vector<uint32_t>> flags(threads, std::vector<uint32_t>(most_variants));
  for (int i = 0; i < threads; ++i) workspaces.emplace_back(most_terms, most_uses, most_variants);
  const MergeVariantsRange run = variant_of_this_cpu();
  parallel_for(grains, threads, [&](int64_t grain, int worker) {
    const int64_t i = std::upper_bound(first_grain.begin(), first_grain.end(), grain) - first_grain.begin() - 1;
    const VariantGroup& g = groups[i];
    const int64_t begin = (grain - first_grain[i]) * kGrain;
    std::vector<uint32_t>& found = flags[worker];
    std::fill(found.begin(), found.end(), 0u);
    run(g, terms, variants, uses, rules, begin, std::min(begin + kGrain, g.size), workspaces[worker].scratch,
        found.data());
    for (int v = 0; v < g.variants; ++v)
      if (found[v]) __atomic_fetch_or(&variants[g.first_variant + v].nonfinite, found[v], __ATOMIC_RELAXED);
  });
}
