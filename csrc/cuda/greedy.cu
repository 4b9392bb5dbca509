#include "instances.h"

namespace flashprune::gpu {

FLASHPRUNE_GREEDY(, float)
FLASHPRUNE_GREEDY(, Half)
FLASHPRUNE_GREEDY(, BFloat16)

}  // namespace flashprune::gpu
