// Concrete masks: a relaxed Bernoulli mask sampled from logits, divided by its mean, and the merge under it.
//
//   m = sigmoid((logit + log u - log(1 - u)) / temperature),   u in [2^-23, 1 - 2^-23] from Philox, by element index
//   out = base + sum_t lambda_t (tau_t m) / mean(m)
//
// m is computed anew in every pass; nothing of it is stored. Each pass goes over all tensors of a model at once.
//
// Bytes an element, T task vectors and model in fp32: mean 4; merge 4 T + 12; reduce 4 T + 8, and 4 with the product;
// update with Adam 4 T + 32, with the product 32. About 150 integer and float operations a pass for u and m.
#pragma once
#include <cstdint>

#include "../dtype.h"

static constexpr int kMaskBlock = 4096;  // elements of one partial sum

enum MaskMode : int32_t {
  kMaskSample = 0,   // out = m
  kMaskMean = 1,     // sums[0] = sum of m
  kMaskMerge = 2,    // out = base + sum_t lambda_t (tau_t m) / mean
  kMaskReduce = 3,   // sums[t] = sum of g tau_t m; and product = g sum_t lambda_t tau_t, where there is a place for it
  kMaskUpdate = 4,   // gradient of the logits, written or taken as a step of Adam
};

struct MaskTask {
  uint64_t x;  // the task vector
  float coefficient;
  int32_t dtype;
};

// One tensor. Addresses are 0 where a mode has no use for them; logits 0: m = 1; base 0: zeros.
struct MaskTensor {
  uint64_t logits, base, out, g, product, gradient, exp_avg, exp_avg_sq, key;
  int64_t size, first_task, first_sum;
  double mean;   // of m
  double shift;  // <g, out - base> / (n mean), which the mean's own gradient takes off everywhere
  int32_t tasks, base_dtype, out_dtype, g_dtype;
};

// exp_avg = beta1 exp_avg + (1 - beta1) gradient; ...; logit -= rate exp_avg / (sqrt(exp_avg_sq) root + epsilon)
struct MaskSettings {
  double temperature;
  float beta1, beta2, rate, root, epsilon;
  int32_t pad;
};

struct MaskScratch {
  uint32_t* words;  // [kMaskBlock + 64]
  float *m, *staged, *total;  // [kMaskBlock + 64] each
};

// One block [begin, begin + n) of a tensor; sums: one for kMaskMean, one a task for kMaskReduce.
typedef void (*MaskBlock)(MaskMode, const MaskTensor&, const MaskTask*, const MaskSettings&, int64_t begin, int n,
                          const MaskScratch&, double* sums);

extern "C" {
void peta_concrete_mask_baseline(MaskMode, const MaskTensor&, const MaskTask*, const MaskSettings&, int64_t, int,
                                 const MaskScratch&, double*);
void peta_concrete_mask_avx2(MaskMode, const MaskTensor&, const MaskTask*, const MaskSettings&, int64_t, int,
                             const MaskScratch&, double*);
void peta_concrete_mask_avx512(MaskMode, const MaskTensor&, const MaskTask*, const MaskSettings&, int64_t, int,
                               const MaskScratch&, double*);
}

// sums [S]: from first_sum of each tensor, as many as its mode has; not touched by other modes.
void concrete_mask(MaskMode, const MaskTensor*, int64_t num_tensors, const MaskTask*, const MaskSettings&,
                   double* sums, int threads);
