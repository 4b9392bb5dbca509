// Products of a few gathered feature rows by one block, on tensor cores, without staging: each lane loads 16 bytes of a
// row and hands them to the matrix instruction as they are. Both operands permute the features alike, so the sums are
// over the same pairs. The warps share out the features and their sums are added in order, so that a pair of rows has
// one value wherever in a tile it stands. Half precision multiplies exactly; float32 as three TF32 products, whose
// error is about 2^-21 of the factors. As in tile.cuh tensor cores sum a few features only, here 32 in half precision
// and 16 in float32, which loses at most 22 and 28 units of 2^-23 of a cosine.
#pragma once

#include <type_traits>

#include "flashprune/tile.cuh"

namespace flashprune::gpu {

inline constexpr int kLineBytes = 64;  // of a row, that the four lanes of a quad load together

// 16 bytes of a row.
struct Piece {
  uint32_t words[4];
};

// From feature k of a row of d; zeros past its end, and where there is no row. kVector: rows are 16-byte aligned and d
// a whole number of pieces.
template <class T, bool kVector>
__device__ __forceinline__ Piece load_piece(const T* row, int k, int d) {
  Piece piece{};
  if (!row || k >= d) return piece;
  if constexpr (kVector) {
#ifdef __CUDACC__
    const uint4 loaded = __ldg(reinterpret_cast<const uint4*>(row + k));
    piece = {loaded.x, loaded.y, loaded.z, loaded.w};
#else
    std::memcpy(&piece, row + k, sizeof(piece));
#endif
  } else {
#pragma unroll
    for (int e = 0; e < int(16 / sizeof(T)); ++e) {
      if (k + e >= d) break;
      if constexpr (sizeof(T) == 4) {
        piece.words[e] = std::bit_cast<uint32_t>(row[k + e]);
      } else {
        piece.words[e / 2] |= uint32_t(row[k + e].bits) << (e % 2 * 16);
      }
    }
  }
  return piece;
}

// d += products of rows g (upper) and g + 8 (lower) with column g, over one piece of each.
template <class T>
__device__ __forceinline__ void multiply(float (&d)[4], const Piece& upper, const Piece& lower, const Piece& column) {
  float part[4] = {};
#pragma unroll
  for (int s = 0; s < 4; s += 2) {
    const uint32_t a[4] = {upper.words[s], lower.words[s], upper.words[s + 1], lower.words[s + 1]};
    const uint32_t b[2] = {column.words[s], column.words[s + 1]};
    if constexpr (std::is_same_v<T, float>) {
      uint32_t a_high[4], a_low[4], b_high[2], b_low[2];
#pragma unroll
      for (int e = 0; e < 4; ++e) split_tf32(a[e], a_high[e], a_low[e]);
#pragma unroll
      for (int e = 0; e < 2; ++e) split_tf32(b[e], b_high[e], b_low[e]);
      mma<T>(part, a_low, b_high);
      mma<T>(part, a_high, b_low);
      mma<T>(part, a_high, b_high);
    } else {
      mma<T>(part, a, b);
    }
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) d[e] = __fadd_rn(d[e], part[e]);
}

// Sums of [kRows, kCols] products, one for each warp. In shared memory; the padding keeps a warp's accesses apart.
template <int kRows, int kCols>
struct Products {
  static constexpr int kStride = kCols + 8;
  static constexpr size_t bytes(int warps) { return size_t(warps) * kRows * kStride * sizeof(float); }

  float* sums;

  // rows[kRows], columns[kCols], in shared memory: null for a row of zeros. By all threads of the block; the sums may
  // be read once it returns.
  template <class T, bool kVector>
  __device__ void compute(const T* const* rows, const T* const* columns, int d) const {
    constexpr int kRowTiles = kRows / 16, kColTiles = kCols / 8, kLine = kLineBytes / int(sizeof(T));
    const int group = lane_index() / 4, warps = int(blockDim.x / 32);
    const T* row[2 * kRowTiles];
    const T* column[kColTiles];
#pragma unroll
    for (int m = 0; m < 2 * kRowTiles; ++m) row[m] = rows[m * 8 + group];
#pragma unroll
    for (int n = 0; n < kColTiles; ++n) column[n] = columns[n * 8 + group];

    float sum[kRowTiles][kColTiles][4] = {};
    const int own = lane_index() % 4 * (kLine / 4);
#pragma unroll 2  // enough loads in flight
    for (int line = warp_index() * kLine; line < d; line += warps * kLine) {
      Piece a[2 * kRowTiles];
#pragma unroll
      for (int m = 0; m < 2 * kRowTiles; ++m) a[m] = load_piece<T, kVector>(row[m], line + own, d);
#pragma unroll
      for (int n = 0; n < kColTiles; ++n) {
        const Piece b = load_piece<T, kVector>(column[n], line + own, d);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) multiply<T>(sum[m][n], a[2 * m], a[2 * m + 1], b);
      }
    }
    float* const mine = sums + warp_index() * kRows * kStride;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kColTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          mine[(m * 16 + e / 2 * 8 + group) * kStride + n * 8 + lane_index() % 4 * 2 + e % 2] = sum[m][n][e];
        }
      }
    }
    __syncthreads();
  }

  __device__ float operator()(int row, int column) const {
    float sum = sums[row * kStride + column];
    for (int w = 1; w < int(blockDim.x / 32); ++w) {
      sum = __fadd_rn(sum, sums[(w * kRows + row) * kStride + column]);
    }
    return sum;
  }
};

}  // namespace flashprune::gpu
