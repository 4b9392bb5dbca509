// What the threads of a block find out together: maxima, sums, sorted keys.
#pragma once

#include "flashprune/cuda.cuh"
#include "flashprune/order.h"

namespace flashprune::gpu {

inline constexpr int kMostWarps = 32;  // of a block: the ints or keys of scratch that the functions below ask for

__device__ __forceinline__ int lane_index() { return int(threadIdx.x % 32); }
__device__ __forceinline__ int warp_index() { return int(threadIdx.x / 32); }

// The largest key of a warp, to all its lanes: two reductions of half a key.
__device__ __forceinline__ Key warp_max(Key key) {
  const uint32_t high = __reduce_max_sync(kAllLanes, uint32_t(key >> 32));
  const uint32_t low = __reduce_max_sync(kAllLanes, uint32_t(key >> 32) == high ? uint32_t(key) : 0u);
  return Key(high) << 32 | low;
}

// The largest key of a block, to all its threads. Two barriers.
__device__ __forceinline__ Key block_max(Key key, Key* scratch) {
  key = warp_max(key);
  if (lane_index() == 0) scratch[warp_index()] = key;
  __syncthreads();
  const int warps = int(blockDim.x + 31) / 32;
  key = warp_max(lane_index() < warps ? scratch[lane_index()] : kNoKey);
  __syncthreads();
  return key;
}

__device__ __forceinline__ int warp_inclusive_sum(int value) {
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(kAllLanes, value, unsigned(step));
    if (lane_index() >= step) value += other;
  }
  return value;
}

// The sum of the values of the threads before this one, and in total that of all. Two barriers.
__device__ __forceinline__ int block_exclusive_sum(int value, int& total, int* scratch) {
  const int inclusive = warp_inclusive_sum(value);
  if (lane_index() == 31) scratch[warp_index()] = inclusive;
  __syncthreads();
  const int warps = int(blockDim.x) / 32;
  const int sums = warp_inclusive_sum(lane_index() < warps ? scratch[lane_index()] : 0);
  total = __shfl_sync(kAllLanes, sums, 31);
  const int before = __shfl_sync(kAllLanes, sums, warp_index() > 0 ? warp_index() - 1 : 0);
  __syncthreads();
  return inclusive - value + (warp_index() > 0 ? before : 0);
}

// Sorts keys in shared memory, largest first; size a power of two from 64. Bitonic: log2(size) (log2(size) + 1) / 2
// steps. A warp's pairs at distances up to 32 are its own 64 keys, so those steps need no barrier of the block. The
// keys have been written, and may be read, without a barrier outside.
__device__ __forceinline__ void block_sort_descending(Key* keys, int size) {
  __syncthreads();
  for (int run = 2; run <= size; run *= 2) {
    for (int step = run / 2; step > 0; step /= 2) {
      for (int pair = int(threadIdx.x); pair < size / 2; pair += int(blockDim.x)) {
        const int i = 2 * pair - (pair & (step - 1)), j = i + step;
        const Key a = keys[i], b = keys[j];
        if ((a < b) == ((i & run) == 0)) {
          keys[i] = b;
          keys[j] = a;
        }
      }
      if (step > 32 || (step == 1 && run > 32)) {
        __syncthreads();
      } else {
        __syncwarp();
      }
    }
  }
  __syncthreads();
}

}  // namespace flashprune::gpu
