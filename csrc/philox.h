// Philox4x32-10 (Salmon et al., SC 2011): counter-based, so that an element's random number depends on its index alone.
#pragma once
#include <cstdint>

// words[j] = word (first + j) % 4 of the block with counter (first + j) / 4, for j in [0, count); first % 4 == 0 and
// room for count rounded up to 4. Written lane by lane so that the compiler vectorizes across counters.
static inline void philox_words(uint32_t* words, uint64_t key, uint64_t first, int count) {
  constexpr int kWide = 16;
  for (int done = 0; done < count; done += 4 * kWide) {
    uint32_t c0[kWide], c1[kWide], c2[kWide], c3[kWide];
    for (int j = 0; j < kWide; ++j) {
      const uint64_t counter = first / 4 + uint64_t(done / 4 + j);
      c0[j] = uint32_t(counter), c1[j] = uint32_t(counter >> 32), c2[j] = 0, c3[j] = 0;
    }
    uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
    for (int round = 0; round < 10; ++round) {
      for (int j = 0; j < kWide; ++j) {
        const uint64_t p0 = uint64_t(0xD2511F53u) * c0[j], p1 = uint64_t(0xCD9E8D57u) * c2[j];
        const uint32_t n0 = uint32_t(p1 >> 32) ^ c1[j] ^ k0, n2 = uint32_t(p0 >> 32) ^ c3[j] ^ k1;
        c0[j] = n0, c1[j] = uint32_t(p1), c2[j] = n2, c3[j] = uint32_t(p0);
      }
      k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    for (int j = 0; j < kWide && done + 4 * j < count; ++j) {
      uint32_t* w = words + done + 4 * j;
      w[0] = c0[j], w[1] = c1[j], w[2] = c2[j], w[3] = c3[j];
    }
  }
}
