// Exact order statistics of |delta| without a sort of the whole: a sample brackets the threshold, one streaming pass
// counts what lies above and keeps what lies inside, and the rest is decided among those few.
//
// Floor: base and T models read once for all tasks and densities, 2 (T + 1) bytes an element in bf16.
// Where the bracket misses it is widened once; then 16 + 15 bit histograms decide. Always exact.
#pragma once
#include <cstdint>

#include "../delta.h"
#include "../dtype.h"

struct SelectTask {
  Delta delta;
  int64_t size;
  int64_t first_query;
  int64_t group;  // tasks of one tensor share it and their pass over memory; they stand together
  int32_t queries, pad;
};

// Which |d| is the count-th largest, 1 <= count <= size. With equals taken lowest index first, exactly `count`
// elements have |d| > threshold, or |d| == threshold and index <= last_index.
struct SelectQuery {
  int64_t count;
  int64_t above, equal, last_index;  // results; last_index is INT64_MAX when all equals are among the first `count`
  uint32_t threshold, pad;           // result: bits of |d|
};

static constexpr int kSelectBlock = 4096;

struct Bracket {
  uint32_t low, high;  // bits; low <= high
};

// What one block holds of one bracket.
struct BlockCount {
  uint32_t above, equal_high, inside, equal_low;
};

// One bracket of one task: what to count, and what was found in a block.
struct Counting {
  const Delta* delta;
  Bracket bracket;
  BlockCount count;
  uint32_t* inside;  // gets the values strictly inside the bracket, in any order; room for n + 16
};

// Counts the block [begin, begin + n), n <= kSelectBlock, for all of them.
typedef void (*CountBlock)(Counting*, int num, int64_t begin, int n);
// out[i] = bits of |d|, room for n rounded up to 16.
typedef void (*MagnitudeBlock)(const Delta&, int64_t begin, int n, uint32_t* out);

extern "C" {
void peta_count_block_baseline(Counting*, int, int64_t, int);
void peta_count_block_avx2(Counting*, int, int64_t, int);
void peta_count_block_avx512(Counting*, int, int64_t, int);
void peta_magnitude_block_baseline(const Delta&, int64_t, int, uint32_t*);
void peta_magnitude_block_avx2(const Delta&, int64_t, int, uint32_t*);
void peta_magnitude_block_avx512(const Delta&, int64_t, int, uint32_t*);
}

void select_magnitudes(const SelectTask* tasks, int64_t num_tasks, SelectQuery* queries, int threads);

// bins[65536] += elements by the upper 16 of their 31 bits of |d|. Histograms of several tensors, shards or machines
// add up.
void magnitude_histogram(const Delta&, int64_t size, uint64_t* bins, int threads);
// bins[32768] += elements whose upper 16 bits are `prefix`, by their lower 15.
void magnitude_histogram_low(const Delta&, int64_t size, uint32_t prefix, uint64_t* bins, int threads);

// Row by row of `columns` elements: out = low + (high - low) * (rank - 1) / (columns - 1), computed in fp64 and rounded
// once, where rank 1 is the smallest |d|, equals ranked by index. A single column gives (low + high) / 2.
void ranked_probability(const Delta&, int64_t begin_row, int64_t rows, int64_t columns, double low, double high,
                        float* out, int threads);
