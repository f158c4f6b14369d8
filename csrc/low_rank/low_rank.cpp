#include "low_rank.h"

#include <algorithm>

#include "../cpu.h"
#include "../pool.h"

FormFactors form_factors() {
#if defined(PETA_X86_VARIANTS)
  if (simd_level() == kAvx512) return peta_form_factors_avx512;
  if (simd_level() == kAvx2) return peta_form_factors_avx2;
#endif
  return peta_form_factors_baseline;
}

void form_low_rank(const Factors& f, int64_t size, float* out, int threads) {
  constexpr int64_t kGrain = 1 << 16;
  const FormFactors form = form_factors();
  parallel_for((size + kGrain - 1) / kGrain, threads, [&](int64_t i, int) {
    form(f, i * kGrain, std::min(kGrain, size - i * kGrain), out + i * kGrain);
  });
}
