#define PETA_VARIANT avx512
#include "_body.h"
