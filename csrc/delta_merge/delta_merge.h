// The fused element-wise algebra of merging. For every element, in fp32, tasks in their given order, one rounding:
//
//   delta -> sparsify -> mask -> prescale -> weight -> elect -> aggregate -> normalize -> scale -> add base -> cast
//
// Floor: each input read once, each output written once; T = 3 in bf16 moves 10 bytes an element.
// The structs are filled by Python (peta_fast/ops/delta_merge.py) as numpy records of the same layout.
#pragma once
#include <cstdint>

#include "../delta.h"
#include "../dtype.h"

enum Keep : int32_t {
  kKeepAll = 0,
  kKeepNone = 1,
  kKeepTop = 2,             // |d| > low, or |d| == low up to element low_index
  kKeepBand = 3,            // top by (low, low_index) without the top by (high, high_index)
  kKeepRandom = 4,          // philox(key, element) < p
  kKeepRandomPerElement = 5 // philox(key, element) < probability[element]
};
enum Elect : int32_t { kElectNone = 0, kElectWeighted = 1, kElectUnweighted = 2, kElectCount = 3, kElectGiven = 4 };
enum Aggregate : int32_t { kSum = 0, kMax = 1, kLargestFirst = 2, kLargestLast = 3, kMedian = 4 };
enum Divide : int32_t { kDivideConstant = 0, kDivideAgreeingWeight = 1, kDivideAgreeingCount = 2 };
enum Mode : int32_t { kMerge = 0, kKeptNorm = 1, kSignTotal = 2 };

struct Task {
  uint64_t x;            // fine-tuned elements, or the ready task vector
  uint64_t mask;         // 0: none. Bits: the tensor's first byte; else the piece's first element
  uint64_t weights;      // 0: none; element-wise weights, multiplied by `weight`
  uint64_t probability;  // fp32, for kKeepRandomPerElement
  uint64_t key;          // of Philox
  int64_t low_index, high_index;
  uint32_t low, high;    // bits of |d|
  float weight, prescale, p;
  int32_t dtype, mask_dtype, weights_dtype, keep, is_delta;
  int32_t by_probability;  // survivors of kKeepRandomPerElement are multiplied by 1 / probability
};

struct Rule {
  int32_t base_kind, elect, zero_sign, aggregate, divide;
  float divisor;  // for kDivideConstant
  float floor;    // agreeing divisors below it become it; exactly 0 becomes 1 when floor is 0
  float scaling;
};

struct Piece {
  uint64_t base, out, sign;
  uint64_t partials;   // kKeptNorm: fp64 [blocks, tasks, 2], sums of |d| and of |kept d|
  int64_t size, start; // elements, and the flat index of the first within its tensor
  int64_t first_task;
  int64_t sign_total;  // result of kSignTotal
  int32_t tasks, rule;
  int32_t base_dtype, out_dtype, sign_dtype;
  uint32_t nonfinite;  // result: 1 an input, 2 the result
};

static constexpr int kChunk = 512;         // elements staged at once, a divisor of kBlock
static constexpr int kBlock = 4096;        // elements of one partial sum
static constexpr int kRow = kChunk + 80;   // a staged row may start up to 3 elements early, and is filled 64 at a time

// One task's elements of one chunk: pointers to the first, staged where the stored form is not plain.
struct View {
  const void* x;
  const float* mask;
  const float* weights;
  const uint32_t* words;
  const float* probability;
  int32_t below;  // kKeepRandom: kept where the 24-bit number is below this; in the plain loop: where |d| is above it
};

// What a worker needs besides registers.
struct Scratch {
  float *words, *mask, *weights, *probability, *input;  // [tasks, kRow] each
  float *base, *sign, *out;                             // [kRow] each
  float* sorted;                                        // [tasks, 16]
  double* sums;                                         // [tasks, 2, 32]
  View* views;                                          // [tasks]
};

// Elements [begin, end) of a piece; begin is a multiple of kBlock.
typedef void (*DeltaMergeRange)(Mode, Piece&, const Task*, const Rule&, int64_t begin, int64_t end, const Scratch&,
                                uint32_t* nonfinite, int64_t* sign_total);

extern "C" {
void peta_delta_merge_baseline(Mode, Piece&, const Task*, const Rule&, int64_t, int64_t, const Scratch&, uint32_t*, int64_t*);
void peta_delta_merge_avx2(Mode, Piece&, const Task*, const Rule&, int64_t, int64_t, const Scratch&, uint32_t*, int64_t*);
void peta_delta_merge_avx512(Mode, Piece&, const Task*, const Rule&, int64_t, int64_t, const Scratch&, uint32_t*, int64_t*);
}

// All pieces, on `threads` threads.
void delta_merge(Mode, Piece* pieces, int64_t num_pieces, const Task* tasks, const Rule* rules, int threads);
