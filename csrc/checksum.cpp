#include "checksum.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "pool.h"

namespace {

constexpr int64_t kBlock = 1 << 20;
constexpr int kLanes = 8;
typedef uint64_t Lanes __attribute__((vector_size(kLanes * 8)));

uint64_t mix(uint64_t state, uint64_t value) {
  state = (state ^ value) * 0x9E3779B97F4A7C15u;
  return state ^ state >> 32;
}

uint64_t of_block(const uint8_t* p, int64_t size) {
  Lanes sum{}, sum_of_sums{}, words;
  int64_t at = 0;
  for (; at + int64_t(sizeof words) <= size; at += sizeof words) {
    std::memcpy(&words, p + at, sizeof words);
    sum += words;
    sum_of_sums += sum;
  }
  words = Lanes{};
  std::memcpy(&words, p + at, size_t(size - at));
  sum += words;
  sum_of_sums += sum;
  uint64_t state = uint64_t(size);
  for (int j = 0; j < kLanes; ++j) state = mix(mix(state, sum[j]), sum_of_sums[j]);
  return state;
}

}  // namespace

uint64_t checksum(const void* bytes, int64_t size, int threads) {
  const int64_t blocks = (size + kBlock - 1) / kBlock;
  std::vector<uint64_t> parts(blocks);
  parallel_for(blocks, threads, [&](int64_t i, int) {
    parts[i] = of_block((const uint8_t*)bytes + i * kBlock, std::min(kBlock, size - i * kBlock));
  });
  uint64_t state = uint64_t(size);
  for (uint64_t part : parts) state = mix(state, part);
  return state;
}
