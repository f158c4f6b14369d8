#define PETA_VARIANT avx2
#include "_body.h"
