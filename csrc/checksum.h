// A checksum of long runs of bytes at the speed of memory, to tell torn and flipped writes from good ones. Not a
// cryptographic hash.
#pragma once
#include <cstdint>

// XXH64 (seed 0) of the XXH64 digests of blocks of 1 MiB, little-endian, in order.
uint64_t checksum(const void* bytes, int64_t size, int threads);
