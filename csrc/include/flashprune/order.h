// The total order of every choice: higher score first, then lower index; NaN counts as -inf, -0.0 equals +0.0.
// constexpr, so that CUDA kernels may call it.
#pragma once

#include <bit>
#include <cstdint>

namespace flashprune {

// A (score, index) pair as one integer: the greater key is the earlier choice, and no two tokens share a key.
using Key = uint64_t;

// Below every token's key: a token that can no longer be chosen, or "no token at all".
inline constexpr Key kNoKey = 0;

constexpr uint32_t ordered_bits(float score) {
  if (score != score) return 0x007fffffu;  // as -inf
  const uint32_t bits = std::bit_cast<uint32_t>(score + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

constexpr Key make_key(float score, int32_t index) { return Key(ordered_bits(score)) << 32 | Key(~uint32_t(index)); }

constexpr int32_t key_index(Key key) { return int32_t(~uint32_t(key)); }

// The score in a key: -inf for NaN, +0.0 for -0.0.
constexpr float key_score(Key key) {
  const uint32_t bits = uint32_t(key >> 32);
  return std::bit_cast<float>(bits & 0x80000000u ? bits & 0x7fffffffu : ~bits);
}

}  // namespace flashprune
