// Sums over task vectors in one pass over memory: fp64, blocks of 4096 elements in flat order, 32 interleaved lanes, a
// fixed tree within and over blocks, so that the result depends on neither threads nor instruction set. The product of
// two fp32 values is exact in fp64: Gram entries suffer from no cancellation but their own sum's.
//
// Floor: base and T models read once, 2 (T + 1) bytes an element in bf16; T (T + 1) flops an element for the Gram.
#pragma once
#include <cstdint>

#include "../delta.h"
#include "../dtype.h"

static constexpr int kStatisticsBlock = 4096;

// Counts of one run of elements; pairs are (i, j), i < j, row by row.
struct StatisticsCounts {
  int64_t* nonfinite;  // [T]
  int64_t* nonzero;    // [T]
  int64_t* conflicts;  // [T (T - 1) / 2] elements where the two have opposite signs
  int64_t* any_conflict;  // [1] elements where any two have
  uint32_t* largest;   // [T] bits of the largest finite or infinite |d|
};

// One block: sums [T] + [T] of d and |d|, then the Gram's upper triangle row by row; counts are added to.
// scratch: [T, kStatisticsBlock + 16] fp32.
typedef void (*StatisticsOfBlock)(const Delta*, int tasks, int64_t begin, int n, double* sums, const StatisticsCounts&,
                                float* scratch);

extern "C" {
void peta_task_statistics_baseline(const Delta*, int, int64_t, int, double*, const StatisticsCounts&, float*);
void peta_task_statistics_avx2(const Delta*, int, int64_t, int, double*, const StatisticsCounts&, float*);
void peta_task_statistics_avx512(const Delta*, int, int64_t, int, double*, const StatisticsCounts&, float*);
}

// sums [2 T + T (T + 1) / 2]; counts as above, overwritten.
void task_statistics(const Delta*, int tasks, int64_t size, double* sums, const StatisticsCounts&, int threads);

// The fixed tree: adjacent pairs, padded with zeros to a power of two. Overwrites the values.
double tree_sum(double* values, int64_t count, int64_t stride);
