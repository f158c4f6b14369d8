// A checksum of long runs of bytes at the speed of memory, to tell torn and flipped writes from good ones. Not a
// cryptographic hash.
#pragma once
#include <cstdint>

// Fletcher sums of 64-bit words in 8 interleaved lanes over blocks of 1 MiB, mixed in order. The tail is padded with
// zeros and the length mixed in.
uint64_t checksum(const void* bytes, int64_t size, int threads);
