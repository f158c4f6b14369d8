#include "checksum.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu.h"
#include "pool.h"
#if defined(PETA_X86_VARIANTS)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t kBlock = 1 << 20, kTogether = 8;
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

constexpr uint64_t kStart[4] = {kP1 + kP2, kP2, 0, -kP1};

// From the four lanes, after all stripes of 32 bytes, and the rest [p, end) of `size` bytes.
uint64_t finish(const uint64_t* lanes, const uint8_t* p, const uint8_t* end, int64_t size) {
  uint64_t h = kP5;
  if (size >= 32) {
    h = rotate(lanes[0], 1) + rotate(lanes[1], 7) + rotate(lanes[2], 12) + rotate(lanes[3], 18);
    for (int i = 0; i < 4; ++i) h = (h ^ round_of(0, lanes[i])) * kP1 + kP4;
  }
  h += uint64_t(size);
  for (; end - p >= 8; p += 8) h = rotate(h ^ round_of(0, load<uint64_t>(p)), 27) * kP1 + kP4;
  for (; end - p >= 4; p += 4) h = rotate(h ^ load<uint32_t>(p) * kP1, 23) * kP2 + kP3;
  for (; p < end; ++p) h = rotate(h ^ *p * kP5, 11) * kP1;
  h = (h ^ h >> 33) * kP2;
  h = (h ^ h >> 29) * kP3;
  return h ^ h >> 32;
}

uint64_t xxh64(const uint8_t* p, int64_t size) {
  const uint8_t* const end = p + size;
  uint64_t a = kStart[0], b = kStart[1], c = kStart[2], d = kStart[3];
  for (; end - p >= 32; p += 32) {
    a = round_of(a, load<uint64_t>(p)), b = round_of(b, load<uint64_t>(p + 8));
    c = round_of(c, load<uint64_t>(p + 16)), d = round_of(d, load<uint64_t>(p + 24));
  }
  const uint64_t lanes[4] = {a, b, c, d};
  return finish(lanes, p, end, size);
}

#if defined(PETA_X86_VARIANTS)
// Digests of eight whole blocks: a register holds the lanes of two, so four chains of products run at once.
__attribute__((target("avx512f,avx512dq"))) void xxh64_of_eight(const uint8_t* p, uint64_t* digests) {
  const __m512i p1 = _mm512_set1_epi64(int64_t(kP1)), p2 = _mm512_set1_epi64(int64_t(kP2));
  __m512i lanes[4];
  for (__m512i& pair : lanes) pair = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)kStart));
  for (int64_t at = 0; at < kBlock; at += 32) {
    for (int i = 0; i < 4; ++i) {
      const uint8_t* const first = p + 2 * i * kBlock + at;
      const __m512i words = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)first)),
                                               _mm256_loadu_si256((const __m256i*)(first + kBlock)), 1);
      const __m512i sum = _mm512_add_epi64(lanes[i], _mm512_mullo_epi64(words, p2));
      lanes[i] = _mm512_mullo_epi64(_mm512_rol_epi64(sum, 31), p1);
    }
  }
  for (int i = 0; i < 4; ++i) {
    uint64_t of_two[8];
    _mm512_storeu_si512(of_two, lanes[i]);
    for (int j = 0; j < 2; ++j) digests[2 * i + j] = finish(of_two + 4 * j, p, p, kBlock);
  }
}
#endif

// Digests of `count` blocks, all of them whole.
void whole_blocks(const uint8_t* p, int64_t count, uint64_t* digests) {
  int64_t i = 0;
#if defined(PETA_X86_VARIANTS)
  if (simd_level() == kAvx512)
    for (; i + kTogether <= count; i += kTogether) xxh64_of_eight(p + i * kBlock, digests + i);
#endif
  for (; i < count; ++i) digests[i] = xxh64(p + i * kBlock, kBlock);
}

}  // namespace

uint64_t checksum(const void* bytes, int64_t size, int threads) {
  const auto* const p = (const uint8_t*)bytes;
  const int64_t whole = size / kBlock, blocks = (size + kBlock - 1) / kBlock;
  std::vector<uint64_t> digests(blocks);
  parallel_for((whole + kTogether - 1) / kTogether, threads, [&](int64_t i, int) {
    const int64_t first = i * kTogether;
    whole_blocks(p + first * kBlock, std::min(kTogether, whole - first), digests.data() + first);
  });
  if (whole < blocks) digests[whole] = xxh64(p + whole * kBlock, size - whole * kBlock);
  return xxh64((const uint8_t*)digests.data(), blocks * 8);
}
