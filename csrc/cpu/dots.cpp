// Matrix products of gathered rows: tiles of A x B rows, both read along d, accumulators in registers.
//
// Compiled once per instruction set, with FLASHPRUNE_ISA naming the namespace. Everything but the table lives in an
// anonymous namespace: an inline function shared with other files could be merged by the linker into the one built
// with AVX-512, which an older processor cannot run.
//
// Cost: 2*m*n*d flops; 106 GFLOP/s on one core of an AVX-512 EPYC (Zen 4, 2 cores), where oneMKL's sgemm reaches 98.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "flashprune/kernels.h"

#ifndef FLASHPRUNE_ISA
#error "compile with -DFLASHPRUNE_ISA=avx512|avx2|baseline"
#endif
#define FLASHPRUNE_STRING_(x) #x
#define FLASHPRUNE_STRING(x) FLASHPRUNE_STRING_(x)

namespace flashprune::FLASHPRUNE_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kTileM = 6, kTileN = 4;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kTileM = 3, kTileN = 2;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kTileM = 2, kTileN = 3;
#else
constexpr int kVectorBytes = 16, kTileM = 1, kTileN = 3;
#endif
constexpr int kWidth = kVectorBytes / int(sizeof(float));
constexpr int kParts = kLanes / kWidth;

// One tile walks this many floats before the next: kTileM rows of A stay in the L1 cache. Fixed, since the partial
// sums of each stretch are added in order.
constexpr int64_t kStretch = 1024;

typedef float Vec __attribute__((vector_size(kVectorBytes)));
typedef float UnalignedVec __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));

// Keeps a loaded vector in a register: GCC would rather fold the load into every use, and then the tile is bound by
// loads (80 instead of 106 GFLOP/s).
inline void pin(Vec& v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
}

template <int kBytes>
struct Lanes {
  typedef float type __attribute__((vector_size(kBytes)));
};
typedef Lanes<16>::type Quad;

inline Quad fold(Quad v) { return v; }
#if defined(__AVX2__)
inline Quad fold(Lanes<32>::type v) {
  return __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
}
#endif
#if defined(__AVX512F__)
inline Quad fold(Lanes<64>::type v) {
  return fold(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
              __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15));
}
#endif

// Sums 16 lanes in one fixed tree: l + (l+8), then + 4, then (0+2) + (1+3). Vectors stay values: an accumulator whose
// address is taken lives on the stack, and the tile then runs at 41 instead of 106 GFLOP/s.
inline float sum_lanes(const Vec (&acc)[kParts]) {
  Quad four;
  if constexpr (kParts == 1) {
    four = fold(acc[0]);
  } else if constexpr (kParts == 2) {
    four = fold(acc[0] + acc[1]);
  } else {
    four = fold(acc[0] + acc[2]) + fold(acc[1] + acc[3]);
  }
  return (four[0] + four[2]) + (four[1] + four[3]);
}

template <int M, int N>
inline __attribute__((always_inline)) void tile(const float* const* a, const float* const* b, int64_t begin,
                                                int64_t end, float* out, int64_t ldo) {
  const float* pa[M];
  const float* pb[N];
  for (int i = 0; i < M; ++i) pa[i] = a[i];
  for (int j = 0; j < N; ++j) pb[j] = b[j];
  Vec acc[M][N][kParts] = {};
  for (int64_t d = begin; d < end; d += kLanes) {
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p) {
      Vec y[N];
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) y[j] = *reinterpret_cast<const UnalignedVec*>(pb[j] + d + p * kWidth);
#pragma GCC unroll 8
      for (int i = 0; i < M; ++i) {
        Vec x = *reinterpret_cast<const UnalignedVec*>(pa[i] + d + p * kWidth);
        pin(x);
#pragma GCC unroll 8
        for (int j = 0; j < N; ++j) acc[i][j][p] += x * y[j];
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) {
      const float sum = sum_lanes(acc[i][j]);
      out[i * ldo + j] = begin == 0 ? sum : out[i * ldo + j] + sum;
    }
  }
}

template <int M>
void tile_columns(const float* const* a, const float* const* b, int n, int64_t begin, int64_t end, float* out,
                  int64_t ldo) {
  int j = 0;
  for (; j + kTileN <= n; j += kTileN) tile<M, kTileN>(a, b + j, begin, end, out + j, ldo);
  if constexpr (kTileN > 3) {
    if (n - j == 3) return tile<M, 3>(a, b + j, begin, end, out + j, ldo);
  }
  if constexpr (kTileN > 2) {
    if (n - j == 2) return tile<M, 2>(a, b + j, begin, end, out + j, ldo);
  }
  if (n - j == 1) tile<M, 1>(a, b + j, begin, end, out + j, ldo);
}

// The last, lower tiles of A: m < kTileM rows.
template <int M = kTileM - 1>
void tile_rest(const float* const* a, int m, const float* const* b, int n, int64_t begin, int64_t end, float* out,
               int64_t ldo) {
  if constexpr (M > 0) {
    if (m == M) return tile_columns<M>(a, b, n, begin, end, out, ldo);
    tile_rest<M - 1>(a, m, b, n, begin, end, out, ldo);
  }
}

void dots(const float* const* a, int m, const float* const* b, int n, int64_t d, float* out, int64_t ldo) {
  const int64_t padded = (d + kLanes - 1) / kLanes * kLanes;
  int64_t begin = 0;
  do {  // once also for d == 0, which zeroes out
    const int64_t end = padded - begin < kStretch ? padded : begin + kStretch;
    int i = 0;
    for (; i + kTileM <= m; i += kTileM) tile_columns<kTileM>(a + i, b, n, begin, end, out + i * ldo, ldo);
    tile_rest(a + i, m - i, b, n, begin, end, out + i * ldo, ldo);
    begin = end;
  } while (begin < padded);
}

float dot(const float* a, const float* b, int64_t n) {
  Vec acc[kParts] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int p = 0; p < kParts; ++p) {
      acc[p] += *reinterpret_cast<const UnalignedVec*>(a + i + p * kWidth) *
                *reinterpret_cast<const UnalignedVec*>(b + i + p * kWidth);
    }
  }
  float sum = sum_lanes(acc);
  for (; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// Exact for every half: the multiplication moves the exponent (subnormals too); infinity and NaN are patched.
inline float half_to_float(uint16_t half) {
  const uint32_t magnitude = uint32_t(half & 0x7fff) << 13;
  const float value = from_bits(magnitude) * 0x1p112f;
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  bits = (half & 0x7c00) == 0x7c00 ? magnitude | 0x7f800000u : bits;
  return from_bits(bits | uint32_t(half & 0x8000) << 16);
}

void load(const void* row, DType dtype, int64_t d, float* out) {
  if (dtype == DType::kFloat32) {
    std::memcpy(out, row, size_t(d) * sizeof(float));
  } else if (dtype == DType::kFloat16) {
    const uint16_t* half = static_cast<const uint16_t*>(row);
    for (int64_t i = 0; i < d; ++i) out[i] = half_to_float(half[i]);
  } else {
    const uint16_t* brain = static_cast<const uint16_t*>(row);
    for (int64_t i = 0; i < d; ++i) out[i] = from_bits(uint32_t(brain[i]) << 16);
  }
  for (int64_t i = d; i % kLanes != 0; ++i) out[i] = 0.0f;
}

void scale(float* row, int64_t d, float factor) {
  for (int64_t i = 0; i < d; ++i) row[i] *= factor;
}

float distance(const float* a, const float* b, int64_t d) {
  Vec acc[kParts] = {};
  for (int64_t i = 0; i < d; i += kLanes) {
    for (int p = 0; p < kParts; ++p) {
      const Vec apart = *reinterpret_cast<const UnalignedVec*>(a + i + p * kWidth) -
                        *reinterpret_cast<const UnalignedVec*>(b + i + p * kWidth);
      acc[p] += apart * apart;
    }
  }
  return sum_lanes(acc);
}

void moments(const float* __restrict row, int64_t d, float share, float* __restrict mean, float* __restrict squares) {
  for (int64_t i = 0; i < d; ++i) {
    const float step = row[i] - mean[i];
    mean[i] += step * share;
    squares[i] += step * (row[i] - mean[i]);
  }
}

}  // namespace

extern const Kernels table;
const Kernels table = {FLASHPRUNE_STRING(FLASHPRUNE_ISA), dots, dot, load, scale, distance, moments};

}  // namespace flashprune::FLASHPRUNE_ISA
