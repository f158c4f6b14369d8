// Several merges of the same tensors in one pass: what the merges have in common is made once, in the cache, and only
// weighting, election, division, scaling and rounding are done for each.
//
//   delta -> sparsify -> mask -> prescale      once for each distinct term
//   weight -> elect -> aggregate -> normalize  once for each variant; for those that differ in scaling alone, once
//   scale -> add base -> cast                  once for each variant
//
// The same arithmetic in the same order as delta_merge, so the same bits as merging each variant by itself.
// Floor: each input read once, each output written once; V variants of T = 3 in bf16 move 8 + 2 V bytes an element.
// The structs are filled by Python (peta_fast/ops/merge_variants.py) as numpy records of the same layout.
#pragma once
#include <cstdint>

#include "../delta_merge/delta_merge.h"

struct Use {  // of a term by a variant
  int32_t term;  // within the group
  float weight;
};

struct Variant {
  uint64_t out;
  int64_t first_use;
  int32_t uses, rule, out_dtype;
  uint32_t nonfinite;  // result: 1 an input of its own, 2 the result
};

struct VariantGroup {  // of variants over the same elements, their deltas taken from one base
  uint64_t base;
  int64_t size, start;  // elements, and the flat index of the first within its tensor
  int64_t first_term, first_variant;
  int32_t terms, variants, base_kind, base_dtype;
};

// One term's elements of one chunk, and what came of them.
struct TermView {
  const void* x;
  const float *mask, *probability;
  const uint32_t* words;
  float* row;    // contributions, [kRow]
  int32_t below; // as in View
  bool used, bad, tame;
};

struct Chunk;
struct VariantScratch;
typedef void (*FindMeans)(const Chunk&, const Use*, int uses, const Rule&, const VariantScratch&);
typedef void (*MakePairs)(const Chunk&, const Use*, int uses, const Rule&, const VariantScratch&, uint16_t* out,
                          bool stream);

// How a variant is merged, the same for all chunks.
struct Way {
  FindMeans any, tame;  // what serves always, and what serves where nothing can overflow
  MakePairs pairs;      // where nothing can overflow, from bf16 to bf16, all at once; may be null
  bool is_tame;         // its factors cannot make anything overflow
  bool shares_means;    // with the variant before it
  bool is_shared;       // with the variant after it
};

// What a worker needs besides registers.
struct VariantScratch {
  float *rows, *words, *mask, *probability, *input;  // [terms, kRow] each
  float *base, *base_input, *means, *out;            // [kRow] each
  float* sorted;                                     // [uses, 16]
  TermView* terms;                                   // [terms]
  Way* ways;                                         // [variants]
};

// Elements [begin, end) of a group. nonfinite: one for each variant of the group.
typedef void (*MergeVariantsRange)(const VariantGroup&, const Task*, const Variant*, const Use*, const Rule*,
                                   int64_t begin, int64_t end, const VariantScratch&, uint32_t* nonfinite);

extern "C" {
void peta_merge_variants_baseline(const VariantGroup&, const Task*, const Variant*, const Use*, const Rule*, int64_t,
                                  int64_t, const VariantScratch&, uint32_t*);
void peta_merge_variants_avx2(const VariantGroup&, const Task*, const Variant*, const Use*, const Rule*, int64_t,
                              int64_t, const VariantScratch&, uint32_t*);
void peta_merge_variants_avx512(const VariantGroup&, const Task*, const Variant*, const Use*, const Rule*, int64_t,
                                int64_t, const VariantScratch&, uint32_t*);
}

// All groups, on `threads` threads.
void merge_variants(const VariantGroup* groups, int64_t num_groups, const Task* terms, Variant* variants,
                    const Use* uses, const Rule* rules, int threads);
