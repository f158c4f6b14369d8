// The loop, once. A variant file defines PETA_VARIANT and includes this.
#include "../delta_load.h"
#include "tile.h"

extern "C" void PETA_JOIN(peta_form_factors_, PETA_VARIANT)(const Factors& f, int64_t begin, int64_t n, float* out) {
  form_tile(f, begin, n, out);
}
