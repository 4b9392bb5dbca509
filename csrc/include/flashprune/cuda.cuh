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
#include "emulation/tensor_core.h"
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

// ---- shared memory --------------------------------------------------------------------------------------------------
// The block's dynamic buffer, 128-byte aligned.
__device__ __forceinline__ unsigned char* shared_memory() {
#ifdef __CUDACC__
  extern __shared__ __align__(128) unsigned char flashprune_shared_memory[];
  return flashprune_shared_memory;
#else
  return flashprune::emulation::self->block->shared;
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

#ifdef __CUDACC__

// ---- asynchronous copies, global to shared --------------------------------------------------------------------------
// Both addresses 16-byte aligned; zeros are written where from is null.
__device__ __forceinline__ void copy_async_16(void* to, const void* from) {
  const uint32_t address = uint32_t(__cvta_generic_to_shared(to));
  const int bytes = from ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from ? from : to), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all but the last kLeft groups of the calling thread.
template <int kLeft>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

// ---- between blocks -------------------------------------------------------------------------------------------------
__device__ __forceinline__ uint32_t load_acquire(const uint32_t* p) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
}

// In the body of every loop that waits for another block.
__device__ __forceinline__ void spin() {}

// ---- matrix instructions --------------------------------------------------------------------------------------------
// d += a b for the 16 x 16 matrix a and the 16 x 8 matrix b of a warp (tf32: 16 x 8 and 8 x 8), products exact, sums
// in float32 that are cut off, not rounded: long sums are made of short ones (tile.cuh). With g = lane / 4 and
// t = lane % 4 a lane holds
//   d: rows g, g, g + 8, g + 8 at columns 2t, 2t + 1, 2t, 2t + 1
//   a: of rows g, g + 8, g, g + 8 the pairs of columns from 2t, 2t, 2t + 8, 2t + 8 (tf32: columns t, t, t + 4, t + 4)
//   b: of column g the pairs of rows from 2t, 2t + 8 (tf32: rows t, t + 4)
template <class T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

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

// The same on the emulation.
inline void copy_async_16(void* to, const void* from, FLASHPRUNE_WHERE) {
  emulation::Machine::current().copy_async(to, from, where);
}
inline void copy_async_commit() { emulation::Machine::current().copy_commit(); }
template <int kLeft>
void copy_async_wait() {
  emulation::Machine::current().copy_wait(kLeft);
}

inline uint32_t load_acquire(const uint32_t* p) {
  emulation::Machine::current().preempt();
  return *p;
}
inline void spin(FLASHPRUNE_WHERE) { emulation::Machine::current().spin(where); }

template <class T>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], FLASHPRUNE_WHERE) {
  struct Fragments {
    uint32_t a[4], b[2];
    float* d;
  };
  const Fragments mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}, d};
  emulation::exchange<int>(kAllLanes, mine, where, [](const Fragments* in, int*, uint32_t) {
    constexpr int kPack = 4 / sizeof(T), kDepth = 8 * kPack;  // numbers of a word, columns of a
    constexpr int kBlock = kDepth / 2;                        // products that are added at once
    const auto number = [](uint32_t word, int part) {
      if constexpr (sizeof(T) == 4) {
        return std::bit_cast<float>(word & 0xffffe000u);
      } else {
        return to_float(T{uint16_t(word >> (16 * part))});
      }
    };
    float left[16][kDepth];
    emulation::CoreRow right[kDepth];
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int part = 0; part < kPack; ++part) {
        const int k = kPack * t + part;
        for (int half = 0; half < 2; ++half) {
          left[g][k + half * kDepth / 2] = number(in[lane].a[2 * half], part);
          left[g + 8][k + half * kDepth / 2] = number(in[lane].a[2 * half + 1], part);
          right[k + half * kDepth / 2][g] = number(in[lane].b[half], part);
        }
      }
    }
    for (int row = 0; row < 16; ++row) {
      const auto d = [&](int column) -> float& { return in[row % 8 * 4 + column / 2].d[row / 8 * 2 + column % 2]; };
      emulation::CoreRow sums;
      for (int column = 0; column < 8; ++column) sums[column] = double(d(column));
      for (int k = 0; k < kDepth; k += kBlock) emulation::add_block(kBlock, left[row] + k, right + k, sums);
      for (int column = 0; column < 8; ++column) d(column) = float(sums[column]);
    }
  });
}

inline void load_matrices(uint32_t (&r)[4], const void* row, FLASHPRUNE_WHERE) {
  struct Pairs {
    uint32_t of[4];
  };
  const Pairs mine = emulation::exchange<Pairs>(kAllLanes, row, where, [](const void* const* in, Pairs* out, uint32_t) {
    for (int l = 0; l < 32; ++l)
      for (int m = 0; m < 4; ++m)
        std::memcpy(&out[l].of[m], static_cast<const char*>(in[m * 8 + l / 4]) + l % 4 * 4, 4);
  });
  std::copy_n(mine.of, 4, r);
}

#endif

}  // namespace flashprune::gpu
