// A tile of cosines of gathered rows, on tensor cores: kTile x kTile of them by 2 kTile threads. Each step takes 128
// bytes of every row, copied two steps ahead of the products into shared memory that is swizzled by 16-byte pieces, one
// barrier a step. Half precision multiplies exactly; float32 takes three TF32 products, with an error of about 2^-21 of
// the factors. The sum over the features has one order whatever the tile, but the two rows of a pair play different
// parts in it: callers give a pair its row and its column by a rule of their own, so that it always has one value.
//
// Tensor cores cut off what they add instead of rounding it, so that the errors of a long sum add up. They sum a few
// features only, and float32 registers, which round, add these sums. A block of p products loses at most (p + 3) / 2
// units of 2^-23 of the magnitudes that it adds. On an A100, whose blocks are the smallest (emulation/tensor_core.h),
// 32 features in half precision are four blocks of 8, and 8 in float32 two of 4 that matter: at most 22 and 7 units of
// a cosine, whatever D is.
#pragma once

#include <type_traits>

#include "flashprune/block.cuh"
#include "flashprune/launch.cuh"

namespace flashprune::gpu {

inline constexpr int kSmallTile = 64, kLargeTile = 128;

__device__ __forceinline__ uint32_t nearest_tf32(uint32_t x) { return (x + 0x1000u) & 0xffffe000u; }

// x = high + low but for the last bits of low.
__device__ __forceinline__ void split_tf32(uint32_t x, uint32_t& high, uint32_t& low) {
  high = nearest_tf32(x);
  low = nearest_tf32(std::bit_cast<uint32_t>(__fsub_rn(std::bit_cast<float>(x), std::bit_cast<float>(high))));
}

template <class T, int kTile>
class CosineTile {
 public:
  static constexpr int kThreads = 2 * kTile;
  // That a multiprocessor is to hold at once: as many as its shared memory, but large tiles take too many registers.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 900 || __CUDA_ARCH__ >= 1200)
  static constexpr int kBlocks = kTile == kLargeTile ? 1 : 3;
#else
  static constexpr int kBlocks = kTile == kLargeTile ? 1 : 4;
#endif

  static size_t shared_bytes() {
    Arena arena;
    CosineTile tile(arena);
    return arena.used();
  }

  __host__ __device__ explicit CosineTile(Arena& arena) {
    stages_ = arena.take<unsigned char>(kStages * kStageBytes, 128);
    rows_ = arena.take<const T*>(2 * kTile);
    inverse_ = arena.take<float>(2 * kTile);
  }

  // For the caller's ints, three a row and three a column, before compute() and after it; lost in between.
  __device__ int* scratch() const { return reinterpret_cast<int*>(cosines() + kTile * kPitch); }

  // Row `slot` of the tile, or from kTile on its column slot - kTile. Without a row or a norm its cosines are 0.
  __device__ void set(int slot, const T* row, float inverse) const {
    rows_[slot] = inverse > 0.0f ? row : nullptr;
    inverse_[slot] = row ? inverse : 0.0f;
  }

  // After all slots are set and scratch() is done with; begins and ends with a barrier. aligned: rows are 16-byte
  // aligned and d a whole number of 16 bytes; square: columns are the rows, and only rows 0 to kTile - 1 need be set.
  __device__ void compute(int d, bool aligned, bool square) const;

  // Valid after compute().
  __device__ float at(int row, int column) const { return cosines()[row * kPitch + column]; }

 private:
  static constexpr int kStages = 3, kRowBytes = 128, kPieces = kRowBytes / 16;
  static constexpr int kElements = 16 / int(sizeof(T));  // of a piece
  static constexpr int kDepth = kRowBytes / int(sizeof(T));
  static constexpr int kChain = sizeof(T) == 4 ? 1 : 2;  // pairs of pieces that tensor cores sum
  static constexpr size_t kStageBytes = size_t(2) * kTile * kRowBytes;
  static constexpr int kPitch = kTile + 1;  // so that columns of cosines are read without conflicts too
  static_assert((kTile * kPitch + 6 * kTile) * sizeof(float) <= kStages * kStageBytes);

  // A warp has kTile / 2 rows and 32 columns of cosines.
  static constexpr int kRowBlocks = kTile / 32, kColumnBlocks = 4, kColumnWarps = kTile / 32;

  __device__ float* cosines() const { return reinterpret_cast<float*>(stages_); }
  __device__ unsigned char* piece(int stage, int slot, int index) const {
    return stages_ + stage * kStageBytes + slot * kRowBytes + (index ^ slot % kPieces) * 16;
  }
  __device__ void load(int stage, int step, int d, bool aligned, bool square) const;
  __device__ void multiply(int stage, int pairs, bool square, float (&sums)[kRowBlocks][kColumnBlocks][4]) const;

  unsigned char* stages_;
  const T** rows_;
  float* inverse_;
};

template <class T, int kTile>
__device__ __forceinline__ void CosineTile<T, kTile>::load(int stage, int step, int d, bool aligned,
                                                           bool square) const {
  const int index = int(threadIdx.x) % kPieces, k = step * kDepth + index * kElements;
  for (int slot = int(threadIdx.x) / kPieces; slot < (square ? kTile : 2 * kTile); slot += kThreads / kPieces) {
    const T* const row = rows_[slot];
    unsigned char* const to = piece(stage, slot, index);
    if (aligned) {
      copy_async_16(to, row && k < d ? row + k : nullptr);
    } else {
#pragma unroll
      for (int e = 0; e < kElements; ++e) reinterpret_cast<T*>(to)[e] = row && k + e < d ? row[k + e] : T{};
    }
  }
}

// Adds the products of the first `pairs` pairs of pieces, rounded up to whole chains: zeros follow the features.
template <class T, int kTile>
__device__ __forceinline__ void CosineTile<T, kTile>::multiply(int stage, int pairs, bool square,
                                                               float (&sums)[kRowBlocks][kColumnBlocks][4]) const {
  const int lane = lane_index();
  const int row = warp_index() / kColumnWarps * (kTile / 2) + lane % 16;
  const int column = (square ? 0 : kTile) + warp_index() % kColumnWarps * 32 + lane % 8 + lane / 16 * 8;
#pragma unroll 1  // more would not fit the registers
  for (int pair = 0; pair < pairs; pair += kChain) {
    uint32_t right[kChain][kColumnBlocks][2], right_low[kChain][kColumnBlocks][2];
#pragma unroll
    for (int c = 0; c < kChain; ++c) {
#pragma unroll
      for (int n = 0; n < kColumnBlocks; n += 2) {
        uint32_t loaded[4];
        load_matrices(loaded, piece(stage, column + n * 8, 2 * (pair + c) + lane / 8 % 2));
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if constexpr (std::is_same_v<T, float>) {
            split_tf32(loaded[e], right[c][n + e / 2][e % 2], right_low[c][n + e / 2][e % 2]);
          } else {
            right[c][n + e / 2][e % 2] = loaded[e];
          }
        }
      }
    }
#pragma unroll
    for (int m = 0; m < kRowBlocks; ++m) {
      float part[kColumnBlocks][4] = {};
#pragma unroll
      for (int c = 0; c < kChain; ++c) {
        uint32_t left[4];
        load_matrices(left, piece(stage, row + m * 16, 2 * (pair + c) + lane / 16));
        if constexpr (std::is_same_v<T, float>) {
          uint32_t left_low[4];
#pragma unroll
          for (int e = 0; e < 4; ++e) split_tf32(left[e], left[e], left_low[e]);
#pragma unroll
          for (int n = 0; n < kColumnBlocks; ++n) mma<T>(part[n], left_low, right[c][n]);
#pragma unroll
          for (int n = 0; n < kColumnBlocks; ++n) mma<T>(part[n], left, right_low[c][n]);
        }
#pragma unroll
        for (int n = 0; n < kColumnBlocks; ++n) mma<T>(part[n], left, right[c][n]);
      }
#pragma unroll
      for (int n = 0; n < kColumnBlocks; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[m][n][e] = __fadd_rn(sums[m][n][e], part[n][e]);
      }
    }
  }
}

template <class T, int kTile>
__device__ __forceinline__ void CosineTile<T, kTile>::compute(int d, bool aligned, bool square) const {
  const int steps = (d + kDepth - 1) / kDepth;
  float sums[kRowBlocks][kColumnBlocks][4] = {};
  __syncthreads();
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) load(step, step, d, aligned, square);
    copy_async_commit();
  }
  int stage = 0;
  for (int step = 0; step < steps; ++step) {
    copy_async_wait<kStages - 2>();
    __syncthreads();  // all see this step's pieces, and none is at the step before
    const int ahead = stage == 0 ? kStages - 1 : stage - 1;
    if (step + kStages - 1 < steps) load(ahead, step + kStages - 1, d, aligned, square);
    copy_async_commit();
    const int left = (d - step * kDepth + 2 * kElements - 1) / (2 * kElements);
    multiply(stage, min(left, kPieces / 2), square, sums);
    stage = stage == kStages - 1 ? 0 : stage + 1;
  }
  copy_async_wait<0>();
  __syncthreads();

  const int row = warp_index() / kColumnWarps * (kTile / 2) + lane_index() / 4;
  const int column = warp_index() % kColumnWarps * 32 + lane_index() % 4 * 2;
  const float* const inverse_columns = inverse_ + (square ? 0 : kTile);
#pragma unroll
  for (int m = 0; m < kRowBlocks; ++m) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int i = row + m * 16 + e / 2 * 8;
      const float inverse = inverse_[i];
#pragma unroll
      for (int n = 0; n < kColumnBlocks; ++n) {
        const int j = column + n * 8 + e % 2;
        // one factor at a time: the product of two inverse norms may overflow
        cosines()[i * kPitch + j] = __fmul_rn(__fmul_rn(sums[m][n][e], inverse), inverse_columns[j]);
      }
    }
  }
  __syncthreads();
}

}  // namespace flashprune::gpu
