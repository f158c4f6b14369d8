#include "cpu.h"

#include <atomic>
#include <cstring>
#include <initializer_list>

namespace {
std::atomic<int> chosen{-1};
}

SimdLevel best_simd_level() {
#if defined(PETA_X86_VARIANTS)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return kAvx2;
#endif
  return kBaseline;
}

SimdLevel simd_level() {
  const int level = chosen.load(std::memory_order_relaxed);
  if (level >= 0) return SimdLevel(level);
  chosen = best_simd_level();
  return SimdLevel(chosen.load());
}

const char* simd_name(SimdLevel level) { return level == kAvx512 ? "avx512" : level == kAvx2 ? "avx2" : "baseline"; }

bool set_simd_level(const char* name) {
  if (!*name) return chosen = best_simd_level(), true;
  for (SimdLevel level : {kBaseline, kAvx2, kAvx512})
    if (!std::strcmp(name, simd_name(level)) && level <= best_simd_level()) return chosen = level, true;
  return false;
}
