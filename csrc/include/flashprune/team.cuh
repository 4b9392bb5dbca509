// Blocks of a cooperative launch that work on one segment together.
#pragma once

#include "flashprune/launch.cuh"

namespace flashprune::gpu {

// Team t is the blocks t * size ... t * size + size - 1. Its barrier is a counter in global memory that starts at 0;
// writes before it are seen by the whole team after it, with plain loads.
class Team {
 public:
  __device__ Team(uint32_t* counters, int size)
      : size(size),
        rank(int(blockIdx.x) % size),
        index(int(blockIdx.x) / size),
        count(int(gridDim.x) / size),
        counter_(counters + index) {}

  __device__ void sync() {
    __syncthreads();
    if (size == 1) return;
    if (threadIdx.x == 0) {
      arrivals_ += uint32_t(size);
      __threadfence();
      atomicAdd(counter_, 1u);
      while (int32_t(load_acquire(counter_) - arrivals_) < 0) spin();  // counters may wrap
      __threadfence();
    }
    __syncthreads();
  }

  const int size, rank, index, count;

 private:
  uint32_t* const counter_;
  uint32_t arrivals_ = 0;  // of the barrier that is awaited next; thread 0's alone
};

// How the blocks that a device holds are shared out: a team for each segment while there are enough, and then a team
// takes several.
struct Teams {
  int size, count;

  Teams(int resident_blocks, int segments, int most) {
    const int share = resident_blocks / (segments > 0 ? segments : 1);
    size = share < 1 ? 1 : share > most ? most : share;
    count = resident_blocks / size;
    if (count > segments) count = segments;
    if (count < 1) count = 1;
  }
  int blocks() const { return size * count; }
};

}  // namespace flashprune::gpu
