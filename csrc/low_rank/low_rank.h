// A tensor [rows, columns] given by low-rank factors, formed tile by tile and never kept:
//
//     t[i, j] = origin[i, j] + sum_k left[i, k] right[k, j]       k ascending, fp32, each step rounded once
//                                                          (FMA, or what equals it): the same bits everywhere
//
// 2 rank flops an element. `right` lies in panels, each of which stays in the first-level cache while a tile's rows go by.
#pragma once
#include <cstdint>

#include "../dtype.h"

static constexpr int kPanel = 64;  // columns

struct Factors {
  uint64_t left, right;     // fp32 [rows, rank], fp32 [ceil(columns / kPanel), rank, kPanel], zeros past the last column
  uint64_t origin;          // 0, or the first element of the tensor that the product is added to
  int64_t columns, first;   // first: flat index, within the tensor, of element 0 of this run
  int32_t rank, origin_dtype;
};

// out[0..n) = elements [begin, begin + n) of the run.
typedef void (*FormFactors)(const Factors&, int64_t begin, int64_t n, float* out);

extern "C" {
void peta_form_factors_baseline(const Factors&, int64_t, int64_t, float*);
void peta_form_factors_avx2(const Factors&, int64_t, int64_t, float*);
void peta_form_factors_avx512(const Factors&, int64_t, int64_t, float*);
}

FormFactors form_factors();

// All of a run, on `threads` threads.
void form_low_rank(const Factors&, int64_t size, float* out, int threads);
