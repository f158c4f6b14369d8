// What the CUDA kernels and their host build share. A kernel is a functor of phases: between two phases all threads of
// a block have met. nvcc launches it; g++ (the host build) loops over blocks, phases and threads, on memory of the host
// and behind the same C interface, so that every result can be tested bit for bit where there is no GPU.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#define PF_HD __host__ __device__ __forceinline__
#else
#define PF_HD inline __attribute__((always_inline))
#endif
#if defined(__CUDA_ARCH__)
#define PF_UNROLL _Pragma("unroll")
#define PF_NO_UNROLL _Pragma("unroll 1")
#else
#define PF_UNROLL
#define PF_NO_UNROLL
#endif
#define PETA_EXPORT extern "C" __attribute__((visibility("default")))

// Where a call runs: the device's number and the caller's stream on it. The host build looks at neither.
struct Place {
  int32_t device;
  void* stream;
};

namespace peta {

struct Block {
  int64_t index, count;
  int thread;
};

// Of this thread's last call that returned something else than 0.
char* error_text();
static constexpr int kErrorText = 512;

inline int fail(int code, const char* who, const char* what) {
  snprintf(error_text(), kErrorText, "%s: %s", who, what);
  return code ? code : -1;
}

PF_HD int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
PF_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

PF_HD uint32_t bits_of(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}
PF_HD float float_of(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}

// ---------------------------------------------------------------- what threads do to the same word

PF_HD void atomic_or(uint32_t* p, uint32_t v) {
#if defined(__CUDA_ARCH__)
  atomicOr(p, v);
#else
  *p |= v;
#endif
}

PF_HD void atomic_max(uint32_t* p, uint32_t v) {
#if defined(__CUDA_ARCH__)
  atomicMax(p, v);
#else
  if (*p < v) *p = v;
#endif
}

PF_HD uint32_t atomic_add(uint32_t* p, uint32_t v) {  // returns what was there
#if defined(__CUDA_ARCH__)
  return atomicAdd(p, v);
#else
  const uint32_t before = *p;
  *p += v;
  return before;
#endif
}

PF_HD int64_t atomic_add(int64_t* p, int64_t v) {
#if defined(__CUDA_ARCH__)
  return int64_t(atomicAdd(reinterpret_cast<unsigned long long*>(p), static_cast<unsigned long long>(v)));
#else
  const int64_t before = *p;
  *p += v;
  return before;
#endif
}

// ++bins[bin]; threads of a warp that come here with one bin add once, since of changes most are zero.
PF_HD void count_in(int64_t* bins, uint32_t bin) {
#if defined(__CUDA_ARCH__)
  const uint32_t same = __match_any_sync(__activemask(), bin);
  if (int(threadIdx.x & 31u) == __ffs(int(same)) - 1) atomic_add(bins + bin, int64_t(__popc(same)));
#else
  ++bins[bin];
#endif
}

// Adds every thread's v; all threads of the block call it.
PF_HD void add_all(uint32_t* p, uint32_t v) {
#if defined(__CUDA_ARCH__)
  v = __reduce_add_sync(0xffffffffu, v);
  if ((threadIdx.x & 31u) == 0 && v) atomicAdd(p, v);
#else
  *p += v;
#endif
}

PF_HD void max_all(uint32_t* p, uint32_t v) {
#if defined(__CUDA_ARCH__)
  v = __reduce_max_sync(0xffffffffu, v);
  if ((threadIdx.x & 31u) == 0 && v) atomicMax(p, v);
#else
  if (*p < v) *p = v;
#endif
}

// ---------------------------------------------------------------- launches
//
// A kernel K has
//   kThreads, a multiple of 32; kBlocks, blocks that an SM should hold at once; kPhases
//   Shared, a plain struct
//   template <int kPhase> void phase(Shared&, const Block&) const

#if defined(__CUDACC__)

template <class K, int... kPhase>
__device__ __forceinline__ void run_phases(const K& kernel, typename K::Shared& shared, const Block& block,
                                           std::integer_sequence<int, kPhase...>) {
  ((kernel.template phase<kPhase>(shared, block), kPhase + 1 < K::kPhases ? __syncthreads() : void()), ...);
}

template <class K>
__global__ void __launch_bounds__(K::kThreads, K::kBlocks) run_kernel(const __grid_constant__ K kernel) {
  __shared__ typename K::Shared shared;
  const Block block{int64_t(blockIdx.x), int64_t(gridDim.x), int(threadIdx.x)};
  run_phases(kernel, shared, block, std::make_integer_sequence<int, K::kPhases>{});
}

inline int check(cudaError_t status, const char* who) {
  if (status == cudaSuccess) return 0;
  cudaGetLastError();  // else the next launch would find it once more
  return fail(int(status), who, cudaGetErrorString(status));
}

template <class K>
int launch(const K& kernel, int64_t blocks, const Place& place, const char* who) {
  if (blocks <= 0) return 0;
  if (blocks > INT32_MAX) return fail(-1, who, "more blocks than a grid can hold");
  run_kernel<K><<<unsigned(blocks), K::kThreads, 0, cudaStream_t(place.stream)>>>(kernel);
  return check(cudaGetLastError(), who);
}

inline int enter(const Place& place, const char* who) { return check(cudaSetDevice(place.device), who); }

// Blocks that fill the device a few times over, for kernels that walk through their work.
inline int64_t full_grid(const Place& place, int blocks_an_sm) {
  int sms = 0;
  if (cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, place.device) != cudaSuccess || sms < 1) sms = 128;
  return int64_t(sms) * blocks_an_sm;
}

inline int clear(void* p, int64_t bytes, const Place& place, const char* who) {
  return bytes > 0 ? check(cudaMemsetAsync(p, 0, size_t(bytes), cudaStream_t(place.stream)), who) : 0;
}

#else

// Threads and blocks run in rising or falling order: what depends on it is a race.
bool backwards();

template <class K, int... kPhase>
void run_block(const K& kernel, typename K::Shared& shared, int64_t index, int64_t count,
               std::integer_sequence<int, kPhase...>) {
  const auto each = [&](auto&& phase) {
    for (int i = 0; i < K::kThreads; ++i) phase(Block{index, count, backwards() ? K::kThreads - 1 - i : i});
  };
  (each([&](const Block& b) { kernel.template phase<kPhase>(shared, b); }), ...);
}

template <class K>
int launch(const K& kernel, int64_t blocks, const Place&, const char*) {
  static_assert(K::kThreads % 32 == 0 && K::kBlocks > 0, "whole warps");
  alignas(16) typename K::Shared shared;
  static_assert(sizeof shared <= 48 * 1024, "more shared memory than every GPU gives a block");
  for (int64_t i = 0; i < blocks; ++i) {
    memset(static_cast<void*>(&shared), 0xA5, sizeof shared);
    run_block(kernel, shared, backwards() ? blocks - 1 - i : i, blocks, std::make_integer_sequence<int, K::kPhases>{});
  }
  return 0;
}

inline int enter(const Place&, const char*) { return 0; }
inline int64_t full_grid(const Place&, int) { return 3; }
inline int clear(void* p, int64_t bytes, const Place&, const char*) {
  if (bytes > 0) memset(p, 0, size_t(bytes));
  return 0;
}

#endif

}  // namespace peta
