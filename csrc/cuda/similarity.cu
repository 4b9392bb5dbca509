#include "instances.h"

namespace flashprune::gpu {

FLASHPRUNE_SIMILARITY(, float)
FLASHPRUNE_SIMILARITY(, Half)
FLASHPRUNE_SIMILARITY(, BFloat16)

}  // namespace flashprune::gpu
