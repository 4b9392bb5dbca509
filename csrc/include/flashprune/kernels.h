// The arithmetic of the CPU engine, one table of functions per instruction set.
#pragma once

#include <cstdint>
#include <vector>

namespace flashprune {

enum class DType : int { kFloat32, kFloat16, kBFloat16 };

// Products accumulate in kLanes partial sums whatever the vector width, so every instruction set with fused
// multiply-add gives the same bits, and so does every tile shape: the cosine of a pair never depends on when, or
// next to whom, it is computed. The engine's exactness at near-ties rests on this.
inline constexpr int kLanes = 16;

// Rows of scratch are 64-byte aligned, zero-padded to kLanes, and an odd number of cache lines apart: with a stride
// that is a multiple of 4 KB the rows of one tile would fall into one set of the L1 cache (an early form of the tile
// ran at 35 instead of 80 GFLOP/s).
inline constexpr int64_t row_stride(int64_t d) { return ((d + kLanes - 1) / kLanes | 1) * kLanes; }

struct Kernels {
  const char* name;

  // out[i, j] = a[i] . b[j] over d floats; a: m rows, b: n rows (scratch rows as above), out: [m, n] with row stride
  // ldo.
  void (*dots)(const float* const* a, int m, const float* const* b, int n, int64_t d, float* out, int64_t ldo);

  // One dot product of two plain arrays of n floats (any n, no padding needed).
  float (*dot)(const float* a, const float* b, int64_t n);

  // Reads one row of d contiguous elements into a scratch row, as float32, zero-padded to kLanes.
  void (*load)(const void* row, DType dtype, int64_t d, float* out);

  // row[0:d] *= scale.
  void (*scale)(float* row, int64_t d, float factor);

  // Squared distance of two scratch rows.
  float (*distance)(const float* a, const float* b, int64_t d);

  // Welford's update of each element's mean and sum of squared deviations by one more row; share is 1 / their number.
  void (*moments)(const float* row, int64_t d, float share, float* mean, float* squares);
};

// The tables that this processor runs, fastest first.
const std::vector<const Kernels*>& runnable_kernels();

// The fastest of them, or the one that the environment's FLASHPRUNE_ISA names; throws if that one does not run here.
const Kernels& kernels();

}  // namespace flashprune
