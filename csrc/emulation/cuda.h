// The CUDA of include/flashprune/cuda.cuh on a CPU, for testing the kernels where there is no GPU. A test tool: slow,
// and not part of a wheel.
//
// Each thread of a block is a fiber that runs until it has to wait (barrier, warp collective, spin) or touches memory
// that others change at the same time (atomics). Who runs next is drawn by a seed: any thread, or one warp far ahead of
// the others, so that a missing barrier shows as a wrong result under some seed. The blocks of a cooperative launch are
// alive all at once, those of others a few at a time, in a random order. What a GPU would turn into a hang or silent
// corruption is an error here that says where:
//   a barrier that only part of a block reaches, or that parts reach at different places in the code
//   a warp collective whose mask names ended lanes, leaves out its caller, or that lanes reach at different places
//   threads that spin, or wait for one another, for ever
// Stricter than a GPU: ended threads count as absent. Shared memory starts as noise that differs by seed; so does the
// destination of an asynchronous copy until the copy is waited for, and what a shuffle reads of a lane that its mask
// leaves out. Memory out of bounds is left to AddressSanitizer.
#pragma once

#include <cmath>
#include <type_traits>

#include "emulation/machine.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

#define threadIdx (::flashprune::emulation::self->index)
#define blockIdx (::flashprune::emulation::self->block->index)
#define blockDim (::flashprune::emulation::Machine::current().launch().block)
#define gridDim (::flashprune::emulation::Machine::current().launch().grid)

// The last parameter of all that may fail: the place of the call.
#define FLASHPRUNE_WHERE ::flashprune::emulation::Where where = ::flashprune::emulation::Where::current()

namespace flashprune::emulation {

// Once all lanes of the mask are here, the last one fills out[lane] of each: complete(in, out, mask). Of lanes that the
// mask leaves out, in[lane] is noise.
template <class Out, class In, class Complete>
Out exchange(uint32_t mask, const In& value, const Where& where, Complete) {
  static_assert(std::is_trivially_copyable_v<In> && std::is_empty_v<Complete>);
  struct Lane {
    const In* in;
    Out out;
  } mine{&value, {}};
  const auto complete = [](void* const* lanes, uint32_t present) {
    In in[32];
    Out out[32] = {};
    for (int l = 0; l < 32; ++l) {
      if (present >> l & 1) {
        in[l] = *static_cast<Lane*>(lanes[l])->in;
      } else {
        std::memset(static_cast<void*>(&in[l]), 0xa5, sizeof(In));
      }
    }
    Complete{}(in, out, present);
    for (int l = 0; l < 32; ++l)
      if (present >> l & 1) static_cast<Lane*>(lanes[l])->out = out[l];
  };
  Machine::current().collective(mask, &mine, complete, where);
  return mine.out;
}

template <class T, class Combine>
T reduce(uint32_t mask, T value, const Where& where, Combine) {
  return exchange<T>(mask, value, where, [](const T* in, T* out, uint32_t present) {
    T total = in[__builtin_ctz(present)];
    for (uint32_t rest = present & (present - 1); rest != 0; rest &= rest - 1)
      total = Combine{}(total, in[__builtin_ctz(rest)]);
    std::fill_n(out, 32, total);
  });
}

template <class T>
T shuffle(uint32_t mask, T value, int from, const Where& where) {
  struct Lane {
    T value;
    int from;
  };
  return exchange<T>(mask, Lane{value, from}, where, [](const Lane* in, T* out, uint32_t) {
    for (int l = 0; l < 32; ++l) out[l] = in[in[l].from & 31].value;
  });
}

// Fibers change only where they wait: a plain operation is atomic, and every write is seen by all at once.
template <class T, class Change>
T atomic(T* p, const Change& change) {
  const T old = *p, now = change(old);
  if (now != old) Machine::current().progress();
  *p = now;
  Machine::current().preempt();
  return old;
}

}  // namespace flashprune::emulation

// ---- barriers and collectives
inline void __syncthreads(FLASHPRUNE_WHERE) { flashprune::emulation::Machine::current().barrier(false, where); }
inline int __syncthreads_count(int vote, FLASHPRUNE_WHERE) {
  flashprune::emulation::Machine::current().barrier(vote != 0, where);
  return flashprune::emulation::self->block->votes;
}
inline int __syncthreads_or(int vote, FLASHPRUNE_WHERE) { return __syncthreads_count(vote, where) > 0; }
inline int __syncthreads_and(int vote, FLASHPRUNE_WHERE) { return __syncthreads_count(!vote, where) == 0; }

inline void __syncwarp(uint32_t mask = 0xffffffffu, FLASHPRUNE_WHERE) {
  flashprune::emulation::exchange<int>(mask, 0, where, [](const int*, int*, uint32_t) {});
}

inline unsigned __activemask() = delete;  // says nothing that a kernel may rely on

template <class T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32, FLASHPRUNE_WHERE) {
  const int lane = int(threadIdx.x % 32);
  return flashprune::emulation::shuffle(mask, value, (lane & -width) + (source & (width - 1)), where);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int lanes, int width = 32, FLASHPRUNE_WHERE) {
  const int lane = int(threadIdx.x % 32), from = lane ^ lanes;  // of a group of lanes that does not come later
  return flashprune::emulation::shuffle(mask, value, from / width <= lane / width ? from : lane, where);
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32, FLASHPRUNE_WHERE) {
  const int lane = int(threadIdx.x % 32), from = lane - int(delta);
  return flashprune::emulation::shuffle(mask, value, from >= (lane & -width) ? from : lane, where);
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32, FLASHPRUNE_WHERE) {
  const int lane = int(threadIdx.x % 32), from = lane + int(delta);
  return flashprune::emulation::shuffle(mask, value, from < (lane & -width) + width ? from : lane, where);
}
inline unsigned __ballot_sync(uint32_t mask, int vote, FLASHPRUNE_WHERE) {
  return flashprune::emulation::exchange<unsigned>(mask, vote, where,
                                                   [](const int* in, unsigned* out, uint32_t present) {
                                                     unsigned bits = 0;
                                                     for (int l = 0; l < 32; ++l) bits |= unsigned(in[l] != 0) << l;
                                                     std::fill_n(out, 32, bits & present);
                                                   });
}
inline int __any_sync(uint32_t mask, int vote, FLASHPRUNE_WHERE) { return __ballot_sync(mask, vote, where) != 0; }
inline int __all_sync(uint32_t mask, int vote, FLASHPRUNE_WHERE) { return __ballot_sync(mask, !vote, where) == 0; }
template <class T>
unsigned __match_any_sync(uint32_t mask, T value, FLASHPRUNE_WHERE) {
  return flashprune::emulation::exchange<unsigned>(mask, value, where,
                                                   [](const T* in, unsigned* out, uint32_t present) {
                                                     for (int l = 0; l < 32; ++l) {
                                                       out[l] = 0;
                                                       for (int m = 0; m < 32; ++m)
                                                         out[l] |= unsigned((present >> m & 1) && in[l] == in[m]) << m;
                                                     }
                                                   });
}
#define FLASHPRUNE_REDUCE(name, T, expression)                                                          \
  inline T name(uint32_t mask, T value, FLASHPRUNE_WHERE) {                                             \
    return flashprune::emulation::reduce(mask, value, where, [](T a, T b) -> T { return expression; }); \
  }
FLASHPRUNE_REDUCE(__reduce_max_sync, unsigned, std::max(a, b))
FLASHPRUNE_REDUCE(__reduce_min_sync, unsigned, std::min(a, b))
FLASHPRUNE_REDUCE(__reduce_add_sync, unsigned, a + b)
FLASHPRUNE_REDUCE(__reduce_and_sync, unsigned, a& b)
FLASHPRUNE_REDUCE(__reduce_or_sync, unsigned, a | b)
FLASHPRUNE_REDUCE(__reduce_xor_sync, unsigned, a ^ b)
FLASHPRUNE_REDUCE(__reduce_max_sync, int, std::max(a, b))
FLASHPRUNE_REDUCE(__reduce_min_sync, int, std::min(a, b))
FLASHPRUNE_REDUCE(__reduce_add_sync, int, a + b)
#undef FLASHPRUNE_REDUCE

// ---- atomics
template <class T>
T atomicAdd(T* p, std::type_identity_t<T> value) {
  return flashprune::emulation::atomic(p, [&](T old) { return T(old + value); });
}
template <class T>
T atomicMax(T* p, std::type_identity_t<T> value) {
  return flashprune::emulation::atomic(p, [&](T old) { return std::max(old, value); });
}
template <class T>
T atomicMin(T* p, std::type_identity_t<T> value) {
  return flashprune::emulation::atomic(p, [&](T old) { return std::min(old, value); });
}
template <class T>
T atomicAnd(T* p, std::type_identity_t<T> value) {
  return flashprune::emulation::atomic(p, [&](T old) { return T(old & value); });
}
template <class T>
T atomicOr(T* p, std::type_identity_t<T> value) {
  return flashprune::emulation::atomic(p, [&](T old) { return T(old | value); });
}
template <class T>
T atomicExch(T* p, std::type_identity_t<T> value) {
  return flashprune::emulation::atomic(p, [&](T) { return value; });
}
template <class T>
T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return flashprune::emulation::atomic(p, [&](T old) { return old == expected ? value : old; });
}
inline void __threadfence() {}

// ---- arithmetic
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)(x)) : 64; }

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }

template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}
