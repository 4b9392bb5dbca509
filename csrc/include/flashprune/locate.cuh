// Blocks of a launch to units of work of its segments, whose lengths are on the device.
#pragma once

#include "flashprune/block.cuh"
#include "flashprune/launch.cuh"

namespace flashprune::gpu {

__host__ __device__ constexpr int ceil_div(int a, int b) { return a / b + (a % b != 0); }

struct Unit {
  int segment;  // -1: there is none
  int index;    // of the segment's units
};

// The item-th unit where a segment of n tokens has units(n) of them. By whole warps; no barrier.
template <class Units>
__device__ __forceinline__ Unit locate(const Segments& all, int item, const Units& units) {
  if (!all.cu_seqlens) {
    const int each = units(all.tokens);
    if (each == 0 || item / each >= all.count) return {-1, 0};
    return {item / each, item % each};
  }
  for (int base = 0; base < all.count; base += 32) {
    const int s = base + lane_index();
    const int own = s < all.count ? units(Segment(all, s).n) : 0;
    const int upto = warp_inclusive_sum(own);
    const uint32_t after = __ballot_sync(kAllLanes, item < upto);
    if (after) {
      const int lane = __ffs(int(after)) - 1;
      return {base + lane, item - __shfl_sync(kAllLanes, upto - own, lane)};
    }
    item -= __shfl_sync(kAllLanes, upto, 31);
  }
  return {-1, 0};
}

// Where packed segments begin, and where the last one ends: each offset of cu_seqlens, which the host cannot see,
// raised to those before it and kept inside the tokens. Whatever they hold, segments then lie side by side. By one
// warp.
template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    ascending_kernel(const int32_t* cu_seqlens, int count, int tokens, int32_t* offsets) {
  int before = 0;
  for (int from = 0; from <= count; from += kThreads) {
    const int s = from + lane_index();
    int offset = min(max(s <= count ? cu_seqlens[s] : 0, before), tokens);
#pragma unroll
    for (int step = 1; step < kThreads; step *= 2) {
      const int other = __shfl_up_sync(kAllLanes, offset, unsigned(step));
      if (lane_index() >= step) offset = max(offset, other);
    }
    if (s <= count) offsets[s] = offset;
    before = __shfl_sync(kAllLanes, offset, kThreads - 1);
  }
}

// Ints that ascending() takes of the workspace.
inline size_t offset_count(const Segments& all) { return all.cu_seqlens ? size_t(all.count) + 1 : 0; }

// The segments of a call whose teams or panels share memory by token.
template <class Stream>
Segments ascending(Stream& stream, Segments all, int32_t* offsets) {
  if (!all.cu_seqlens) return all;
  stream.launch(ascending_kernel<32>, Shape{dim3{1, 1, 1}, 32}, all.cu_seqlens, all.count, all.tokens, offsets);
  all.cu_seqlens = offsets;
  return all;
}

// Blocks enough for ceil(n / size) units a segment of n tokens.
inline int most_chunks(const Segments& all, int size) {
  return all.cu_seqlens ? all.tokens / size + all.count : all.count * ceil_div(all.tokens, size);
}

// Tiles on and above the diagonal of a square of that many.
__host__ __device__ constexpr int triangle(int tiles) { return tiles * (tiles + 1) / 2; }

// Blocks enough for all triangles of tiles, where no segment's square is larger than `most` tokens.
inline int most_triangles(const Segments& all, int tile, int most) {
  const int side = ceil_div(all.tokens < most ? all.tokens : most, tile);
  if (!all.cu_seqlens) return all.count * triangle(side);
  // A segment of c tiles a side has c (c + 1) / 2 of them, at most (side + 1) / 2 for each of its c.
  const int64_t sides = int64_t(all.tokens / tile) + all.count;
  const int64_t bound = sides * (side + 1) / 2, each = int64_t(all.count) * triangle(side);
  return int(bound < each ? bound : each);
}

// Row and column, row <= column, of a triangle's tile.
struct TriangleTile {
  int row, column;

  __device__ explicit TriangleTile(int index) {
    column = int((__fsqrt_rn(8.0f * float(index) + 1.0f) - 1.0f) / 2.0f);
    while (triangle(column) > index) --column;
    while (triangle(column + 1) <= index) ++column;
    row = index - triangle(column);
  }
};

}  // namespace flashprune::gpu
