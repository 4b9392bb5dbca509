// Top-k in the total order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <iterator>
#include <vector>

#include "flashprune/order.h"

namespace flashprune {

// The k first of n tokens, best first. Cost: O(n + k log k).
inline std::vector<int> topk_select(const float* scores, int n, int k) {
  std::vector<Key> keys(static_cast<size_t>(n));
  for (int i = 0; i < n; ++i) keys[i] = make_key(scores[i], i);
  if (k < n) std::nth_element(keys.begin(), keys.begin() + k, keys.end(), std::greater<>());
  keys.resize(size_t(k));
  std::sort(keys.begin(), keys.end(), std::greater<>());
  std::vector<int> picks(static_cast<size_t>(k));
  std::transform(keys.begin(), keys.end(), picks.begin(), key_index);
  return picks;
}

// The tokens of 0 ... n-1 that are not in picks, ascending.
inline std::vector<int> tokens_without(int n, const std::vector<int>& picks) {
  std::vector<bool> taken(size_t(n), false);
  for (int i : picks) taken[i] = true;
  std::vector<int> rest;
  rest.reserve(size_t(n) - picks.size());
  for (int i = 0; i < n; ++i) {
    if (!taken[i]) rest.push_back(i);
  }
  return rest;
}

// Appends the best tokens outside picks until there are k.
inline void fill_by_score(const float* scores, int n, int k, std::vector<int>& picks) {
  if (int(picks.size()) >= k) return;
  std::vector<Key> keys;
  for (int i : tokens_without(n, picks)) keys.push_back(make_key(scores[i], i));
  const auto missing = std::ptrdiff_t(k) - std::ptrdiff_t(picks.size());
  std::partial_sort(keys.begin(), keys.begin() + missing, keys.end(), std::greater<>());
  std::transform(keys.begin(), keys.begin() + missing, std::back_inserter(picks), key_index);
}

}  // namespace flashprune
