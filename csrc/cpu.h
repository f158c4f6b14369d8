// Which instruction set the variants run with: the best that the CPU has, or less if PETA_FAST_SIMD says so.
#pragma once

enum SimdLevel { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };

SimdLevel simd_level();
SimdLevel best_simd_level();
// "baseline", "avx2", "avx512", or "" for the best; returns false for an unknown name or one this CPU lacks.
bool set_simd_level(const char* name);
const char* simd_name(SimdLevel level);
