// Dtype codes shared with Python (peta_fast/buffers.py MERGEABLE, plus the mask forms) and their sizes.
#pragma once
#include <cstdint>

enum Dtype : int32_t {
  kF32 = 0,
  kF16 = 1,
  kBF16 = 2,
  kBits = 3,   // masks only: one bit an element, little-endian within the byte
  kBytes = 4,  // masks only: zero or not, one byte an element
  kFactors = 5,  // models only: the address is that of a Factors record (low_rank/low_rank.h)
};

// Static, not inline: a weak symbol out of an AVX file must never serve a CPU without AVX.
static constexpr int64_t itemsize(int32_t dtype) { return dtype == kF32 ? 4 : dtype == kBytes ? 1 : 2; }

static constexpr uint32_t kAbsMask = 0x7fffffffu;   // |x| as ordered bits
static constexpr uint32_t kInfBits = 0x7f800000u;   // bits(|x|) >= this: inf or NaN
static constexpr uint32_t kNanBits = 0x7fc00000u;   // the one NaN that is ever written
