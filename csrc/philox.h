// Philox4x32-10 (Salmon et al., SC 2011): counter-based, so that an element's random number depends on its index alone.
#pragma once
#include <cstdint>
#include <cstring>

#include "simd.h"

namespace {

typedef uint64_t vq __attribute__((vector_size(W * 4)));  // W / 2 counters; of each word the lower half counts
static constexpr int Q = W / 2;

PF_INLINE vq wide_product(vq a, uint32_t factor) {
  const vq f = vq{} + factor;
#if defined(__AVX512F__)
  return (vq)_mm512_mul_epu32((__m512i)a, (__m512i)f);
#elif defined(__AVX2__)
  return (vq)_mm256_mul_epu32((__m256i)a, (__m256i)f);
#elif defined(__x86_64__)
  return (vq)_mm_mul_epu32((__m128i)a, (__m128i)f);
#else
  return (a & 0xffffffffu) * f;
#endif
}

// words[j] = word (first + j) % 4 of the block with counter (first + j) / 4, for j in [0, count); first % 4 == 0 and
// room for count rounded up to 64.
PF_INLINE void philox_words(uint32_t* words, uint64_t key, uint64_t first, int count) {
  constexpr int kVectors = 16 / Q;  // side by side, 64 words in all
  vq lane, low_pairs, high_pairs;
  for (int j = 0; j < Q; ++j)
    lane[j] = uint64_t(j), low_pairs[j] = uint64_t(j / 2 + j % 2 * Q), high_pairs[j] = low_pairs[j] + Q / 2;
  for (int done = 0; done < count; done += 64) {
    vq c0[kVectors], c1[kVectors], c2[kVectors], c3[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      c0[v] = lane + (first / 4 + uint64_t(done / 4 + v * Q));
      c1[v] = c0[v] >> 32, c2[v] = vq{}, c3[v] = vq{};
    }
    uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
    for (int round = 0; round < 10; ++round) {
      for (int v = 0; v < kVectors; ++v) {
        const vq p0 = wide_product(c0[v], 0xD2511F53u), p1 = wide_product(c2[v], 0xCD9E8D57u);
        c0[v] = p1 >> 32 ^ c1[v] ^ k0, c1[v] = p1;
        c2[v] = p0 >> 32 ^ c3[v] ^ k1, c3[v] = p0;
      }
      k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    for (int v = 0; v < kVectors; ++v) {  // words 0 and 1 of every counter, 2 and 3, then both interleaved
      const vq front = (c0[v] & 0xffffffffu) | c1[v] << 32, back = (c2[v] & 0xffffffffu) | c3[v] << 32;
      const vq low = __builtin_shuffle(front, back, low_pairs), high = __builtin_shuffle(front, back, high_pairs);
      memcpy(words + done + v * 4 * Q, &low, sizeof low);
      memcpy(words + done + v * 4 * Q + 2 * Q, &high, sizeof high);
    }
  }
}

}  // namespace
