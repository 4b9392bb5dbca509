// The CUDA that the kernels are written in: nvcc's, or under a C++ compiler the emulation of csrc/emulation. What the
// two spell differently is here: shared memory, asynchronous copies, matrix instructions, acquire and release.
//
// Kernels take one-dimensional blocks and have all their shared memory in one dynamic buffer, so that the emulation can
// keep several blocks alive.
#pragma once

#ifdef __CUDACC__
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#else
#include "emulation/cuda.h"
#endif

#include <bit>
#include <cstddef>
#include <cstdint>

namespace flashprune::gpu {

inline constexpr uint32_t kAllLanes = 0xffffffffu;

// ---- element types: the bits of a number, whatever header defines its arithmetic ------------------------------------
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(BFloat16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }
__device__ __forceinline__ float to_float(Half x) {
#ifdef __CUDACC__
  return __half2float(__ushort_as_half(x.bits));
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, exponent = x.bits >> 10 & 31u, fraction = x.bits & 0x3ffu;
  if (exponent == 0) return std::bit_cast<float>(sign | 0x3f800000u) * float(fraction) * 0x1p-24f;
  return std::bit_cast<float>(sign | (exponent == 31 ? 255u : exponent + 112u) << 23 | fraction << 13);
#endif
}

// ---- shared memory
// --------------------------------------------------------------------------------------------------- The block's
// dynamic buffer, 128-byte aligned.
__device__ __forceinline__ unsigned char* shared_memory() {
#ifdef __CUDACC__
  extern __shared__ __align__(128) unsigned char flashprune_shared_memory[];
  return flashprune_shared_memory;
#else
  return flashprune::emulation::thread().block->shared;
#endif
}

// Deals out a buffer, on the host to learn its size and on the device to use it.
class Arena {
 public:
  __host__ __device__ explicit Arena(unsigned char* base = nullptr) : base_(base) {}

  template <class T>
  __host__ __device__ T* take(size_t count, size_t alignment = 16) {
    used_ = (used_ + alignment - 1) / alignment * alignment;
    T* const p = reinterpret_cast<T*>(base_ + used_);
    used_ += count * sizeof(T);
    return p;
  }
  __host__ __device__ size_t used() const { return used_; }

 private:
  unsigned char* base_;
  size_t used_ = 0;
};

// ---- asynchronous copies, global to shared
// --------------------------------------------------------------------------- Both addresses 16-byte aligned; zeros are
// written where from is null.
__device__ __forceinline__ void copy_async_16(void* to, const void* from) {
#ifdef __CUDACC__
  const uint32_t address = uint32_t(__cvta_generic_to_shared(to));
  const int bytes = from ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from ? from : to), "r"(bytes)
               : "memory");
#else
  flashprune::emulation::thread().open.push_back({to, from, 16});
#endif
}

__device__ __forceinline__ void copy_async_commit() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  flashprune::emulation::Thread& thread = flashprune::emulation::thread();
  thread.groups.push_back(std::move(thread.open));
  thread.open.clear();
#endif
}

// Waits for all but the last kLeft groups of the calling thread.
template <int kLeft>
__device__ __forceinline__ void copy_async_wait() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
#else
  flashprune::emulation::Machine::land(flashprune::emulation::thread(), kLeft);
#endif
}

// ---- between blocks
// --------------------------------------------------------------------------------------------------
__device__ __forceinline__ uint32_t load_acquire(const uint32_t* p) {
#ifdef __CUDACC__
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
#else
  return *p;
#endif
}

// In the body of every loop that waits for another block.
__device__ __forceinline__ void spin() {
#ifndef __CUDACC__
  flashprune::emulation::Machine::current().spin();
#endif
}

// ---- matrix instructions
// --------------------------------------------------------------------------------------------- d += a b for the 16 x
// 16 matrix a and the 16 x 8 matrix b of a warp (tf32: 16 x 8 and 8 x 8), sums in float32. With g = lane / 4 and t =
// lane % 4 a lane holds
//   d: rows g, g, g + 8, g + 8 at columns 2t, 2t + 1, 2t, 2t + 1
//   a: of rows g, g + 8, g, g + 8 the pairs of columns from 2t, 2t, 2t + 8, 2t + 8 (tf32: columns t, t, t + 4, t + 4)
//   b: of column g the pairs of rows from 2t, 2t + 8 (tf32: rows t, t + 4)
template <class T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

#ifdef __CUDACC__

template <>
__device__ __forceinline__ void mma<BFloat16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void mma<Half>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// float stands for tf32: the operands are float32 whose low 13 bits are zero.
template <>
__device__ __forceinline__ void mma<float>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8 x 8 matrices of 16-bit numbers from shared memory; lane l gives the 16-byte aligned address of row l % 8 of
// matrix l / 8 and receives of each matrix the pair of row l / 4 from column 2 (l % 4).
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
  const uint32_t address = uint32_t(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

#else

template <class T>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Fragments {
    uint32_t a[4], b[2];
    // What a lane holds at the given place of the operand's row: an element of a pair, or of tf32 the number.
    static float element(const uint32_t* pairs, int k) {
      if constexpr (sizeof(T) == 4) {
        return std::bit_cast<float>(pairs[k / 4]);
      } else {
        const uint16_t bits = uint16_t(pairs[k / 8] >> (k % 2 * 16));
        return to_float(T{bits});
      }
    }
  } mine;
  std::copy_n(a, 4, mine.a);
  std::copy_n(b, 2, mine.b);
  static const char operation = 0;
  const int g = int(threadIdx.x % 32 / 4), t = int(threadIdx.x % 4);
  constexpr int kDepth = sizeof(T) == 4 ? 8 : 16;
  flashprune::emulation::exchange(kAllLanes, mine, &operation, std::source_location::current(),
                                  [&](const Fragments* all) {
                                    for (int e = 0; e < 4; ++e) {
                                      const int row = g + e / 2 * 8, column = 2 * t + e % 2;
                                      float sum = 0.0f;
                                      for (int k = 0; k < kDepth; ++k) {
                                        const int holder = sizeof(T) == 4 ? k % 4 : k % 8 / 2;
                                        const Fragments& left = all[row % 8 * 4 + holder];
                                        const Fragments& right = all[column * 4 + holder];
                                        const uint32_t of_row[2] = {left.a[row / 8], left.a[row / 8 + 2]};
                                        sum += Fragments::element(of_row, k) * Fragments::element(right.b, k);
                                      }
                                      d[e] += sum;
                                    }
                                    return 0;
                                  });
}

inline void load_matrices(uint32_t (&r)[4], const void* row) {
  static const char operation = 0;
  const int lane = int(threadIdx.x % 32);
  flashprune::emulation::exchange(
      kAllLanes, row, &operation, std::source_location::current(), [&](const void* const* rows) {
        for (int m = 0; m < 4; ++m)
          std::memcpy(&r[m], static_cast<const char*>(rows[m * 8 + lane / 4]) + lane % 4 * 4, 4);
        return 0;
      });
}

#endif

}  // namespace flashprune::gpu
