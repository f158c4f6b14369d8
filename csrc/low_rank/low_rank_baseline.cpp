#define PETA_VARIANT baseline
#include "_body.h"
