// What the library says of itself, errors, and copies between host and device.
#include "device.h"

namespace peta {

char* error_text() {
  static thread_local char text[kErrorText] = "";
  return text;
}

#if !defined(__CUDACC__)
static bool is_backwards = false;
bool backwards() { return is_backwards; }
#endif

}  // namespace peta

PETA_EXPORT const char* peta_error() { return peta::error_text(); }

// Changes with every change of the C interface.
PETA_EXPORT int32_t peta_interface() { return 1; }

// "cuda" or "host".
PETA_EXPORT const char* peta_kind() {
#if defined(__CUDACC__)
  return "cuda";
#else
  return "host";
#endif
}

// CUDA's version that it was built with, 1000 major + 10 minor; 0 for the host build.
PETA_EXPORT int32_t peta_toolkit() {
#if defined(__CUDACC__)
  return CUDART_VERSION;
#else
  return 0;
#endif
}

// Asynchronous on the place's stream, between any two memories.
PETA_EXPORT int32_t peta_copy(Place place, void* to, const void* from, int64_t bytes) {
  if (bytes <= 0 || to == from) return 0;
#if defined(__CUDACC__)
  if (const int failed = peta::enter(place, "copy")) return failed;
  const cudaError_t status = cudaMemcpyAsync(to, from, size_t(bytes), cudaMemcpyDefault, cudaStream_t(place.stream));
  return peta::check(status, "copy");
#else
  (void)place;
  memcpy(to, from, size_t(bytes));
  return 0;
#endif
}

// The host build's threads and blocks in falling order, to find what depends on it. Elsewhere without effect.
PETA_EXPORT void peta_backwards(int32_t on) {
#if defined(__CUDACC__)
  (void)on;
#else
  peta::is_backwards = on != 0;
#endif
}
