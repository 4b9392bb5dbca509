// Kernels that several operators launch: compiled once, in similarity.cu and greedy.cu, instead of in each of them.
#pragma once

#include "flashprune/greedy.cuh"
#include "stream.h"

#define FLASHPRUNE_SIMILARITY(linkage, T)                                                    \
  linkage template void inverse_norms<T>(CudaStream&, const Segments&, const Rows&, float*); \
  linkage template void all_pairs<T>(CudaStream&, const Segments&, const Rows&, const float*, uint32_t*, float*, int);

#define FLASHPRUNE_GREEDY(linkage, T)                                                                     \
  linkage template GreedyLaunch<T>::GreedyLaunch(CudaStream&, const Rows&, const Segments&, int, Arena&); \
  linkage template void GreedyLaunch<T>::run(CudaStream&) const;

namespace flashprune::gpu {

FLASHPRUNE_SIMILARITY(extern, float)
FLASHPRUNE_SIMILARITY(extern, Half)
FLASHPRUNE_SIMILARITY(extern, BFloat16)
FLASHPRUNE_GREEDY(extern, float)
FLASHPRUNE_GREEDY(extern, Half)
FLASHPRUNE_GREEDY(extern, BFloat16)

}  // namespace flashprune::gpu
