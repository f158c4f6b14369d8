// Philox4x32-10 (Salmon et al., SC 2011) for the CUDA kernels: the words of csrc/philox.h, one counter at a time.
#pragma once
#include "device.h"

namespace peta {

// words[0..4) of the block with this counter.
PF_HD void philox_block(uint32_t (&words)[4], uint64_t key, uint64_t counter) {
  uint32_t c0 = uint32_t(counter), c1 = uint32_t(counter >> 32), c2 = 0, c3 = 0;
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
  PF_UNROLL
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(c0) * 0xD2511F53u, p1 = uint64_t(c2) * 0xCD9E8D57u;
    c0 = uint32_t(p1 >> 32) ^ c1 ^ k0, c1 = uint32_t(p1);
    c2 = uint32_t(p0 >> 32) ^ c3 ^ k1, c3 = uint32_t(p0);
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
}

// The words of V elements from flat index `first` on.
template <int V>
PF_HD void philox_words(uint32_t (&out)[V], uint64_t key, uint64_t first) {
  const int offset = int(first & 3u);
  if (V % 4 == 0 && offset == 0) {
    PF_UNROLL
    for (int q = 0; q < V / 4; ++q) {
      uint32_t w[4];
      philox_block(w, key, first / 4 + uint64_t(q));
      PF_UNROLL
      for (int j = 0; j < 4; ++j) out[q * 4 + j] = w[j];
    }
    return;
  }
  PF_UNROLL
  for (int j = 0; j < V; ++j) out[j] = 0;
  PF_NO_UNROLL
  for (int q = 0; q <= (offset + V - 1) / 4; ++q) {
    uint32_t w[4];
    philox_block(w, key, first / 4 + uint64_t(q));
    PF_UNROLL
    for (int j = 0; j < V; ++j) {
      const int place = offset + j - 4 * q;
      if (place >= 0 && place < 4) out[j] = place == 0 ? w[0] : place == 1 ? w[1] : place == 2 ? w[2] : w[3];
    }
  }
}

}  // namespace peta
