#include "checksum.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "pool.h"

namespace {

constexpr int64_t kBlock = 1 << 20;
constexpr uint64_t kP1 = 0x9E3779B185EBCA87u, kP2 = 0xC2B2AE3D27D4EB4Fu, kP3 = 0x165667B19E3779F9u,
                   kP4 = 0x85EBCA77C2B2AE63u, kP5 = 0x27D4EB2F165667C5u;

uint64_t rotate(uint64_t x, int by) { return x << by | x >> (64 - by); }

template <class T>
uint64_t load(const uint8_t* p) {
  T word;
  std::memcpy(&word, p, sizeof word);
  return word;
}

uint64_t round_of(uint64_t lane, uint64_t word) { return rotate(lane + word * kP2, 31) * kP1; }

uint64_t xxh64(const uint8_t* p, int64_t size) {
  const uint8_t* const end = p + size;
  uint64_t h = kP5;
  if (size >= 32) {
    uint64_t a = kP1 + kP2, b = kP2, c = 0, d = -kP1;
    for (; end - p >= 32; p += 32) {
      a = round_of(a, load<uint64_t>(p)), b = round_of(b, load<uint64_t>(p + 8));
      c = round_of(c, load<uint64_t>(p + 16)), d = round_of(d, load<uint64_t>(p + 24));
    }
    h = rotate(a, 1) + rotate(b, 7) + rotate(c, 12) + rotate(d, 18);
    for (uint64_t lane : {a, b, c, d}) h = (h ^ round_of(0, lane)) * kP1 + kP4;
  }
  h += uint64_t(size);
  for (; end - p >= 8; p += 8) h = rotate(h ^ round_of(0, load<uint64_t>(p)), 27) * kP1 + kP4;
  for (; end - p >= 4; p += 4) h = rotate(h ^ load<uint32_t>(p) * kP1, 23) * kP2 + kP3;
  for (; p < end; ++p) h = rotate(h ^ *p * kP5, 11) * kP1;
  h = (h ^ h >> 33) * kP2;
  h = (h ^ h >> 29) * kP3;
  return h ^ h >> 32;
}

}  // namespace

uint64_t checksum(const void* bytes, int64_t size, int threads) {
  const int64_t blocks = (size + kBlock - 1) / kBlock;
  std::vector<uint64_t> parts(blocks);
  parallel_for(blocks, threads, [&](int64_t i, int) {
    parts[i] = xxh64((const uint8_t*)bytes + i * kBlock, std::min(kBlock, size - i * kBlock));
  });
  return xxh64((const uint8_t*)parts.data(), blocks * 8);
}
