// What a tensor core adds up, as measurements of the hardware describe it (Fasi, Higham, Mikaitis and Pranesh, PeerJ
// Computer Science 7:e330, 2021; Khattak and Mikaitis, arXiv 2512.07004, 2025). A matrix instruction goes by blocks of
// products. Products are exact; they and the sum so far are aligned to the largest of them, cut off some bits below the
// last one of a float32 of its size, and added exactly; the new sum is cut off to float32. Nothing is rounded, so
// errors do not average out. Emulated is the A100, the coarsest of the GPUs that are served: blocks of 8 half-precision
// or 4 TF32 products and one bit more than float32. (An H100 takes 16 or 8 and two bits.)
#pragma once

#include <cstdint>

namespace flashprune::emulation {

inline constexpr int kCoreColumns = 8, kCoreBits = 23 + 1;  // after the first one of the largest addend
inline constexpr int kMostProducts = 8;                     // of a block

using CoreRow = double __attribute__((vector_size(8 * kCoreColumns)));

// sums += left[0] right[0] + left[1] right[1] + ..., one block. A float64 holds every addend exactly.
inline void add_block(int products, const float* left, const CoreRow* right, CoreRow& sums) {
  using Bits = uint64_t __attribute__((vector_size(8 * kCoreColumns)));
  using Ints = int32_t __attribute__((vector_size(4 * kCoreColumns)));
  using Total = uint32_t __attribute__((vector_size(4 * kCoreColumns)));  // which may wrap where a number is infinite
  CoreRow addends[kMostProducts + 1] = {sums};
  for (int k = 0; k < products; ++k) addends[k + 1] = double(left[k]) * right[k];

  CoreRow largest = CoreRow{} + 0x1p-300, plain{};
  for (int k = 0; k <= products; ++k) {
    const CoreRow magnitude = CoreRow(Bits(addends[k]) & ~uint64_t(0) >> 1);
    largest = magnitude > largest ? magnitude : largest;
    plain += addends[k];
  }
  const Bits exponent = Bits(largest) >> 52;
  const CoreRow scale = CoreRow((2 * 1023 + kCoreBits - exponent) << 52);  // the last bit that is kept becomes 1
  Total total{};
  for (int k = 0; k <= products; ++k) total += Total(__builtin_convertvector(addends[k] * scale, Ints));
  const CoreRow sum = __builtin_convertvector(Ints(total), CoreRow) / scale;
  const CoreRow cut = CoreRow(Bits(sum) & ~uint64_t(0) << (52 - 23));
  sums = plain - plain == 0.0 ? cut : plain;  // infinities and NaN as they come
}

}  // namespace flashprune::emulation
