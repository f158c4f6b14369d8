// A task vector as stored: fine-tuned elements and their base, or the ready difference. Where dtype is kFactors, x is the
// address of a Factors record, whose elements are formed when they are wanted.
#pragma once
#include <cstdint>

enum BaseKind : int32_t { kBaseTensor = 0, kBaseZero = 1, kBaseOne = 2 };

struct Delta {
  uint64_t base, x;
  int32_t base_kind, base_dtype, dtype, is_delta;
};
