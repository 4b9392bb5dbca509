// Max-min diversity (DivPrune, arXiv 2503.02175): the token farthest, in cosine distance, from all that are kept.
#pragma once

#include <algorithm>
#include <functional>
#include <limits>
#include <vector>

#include "flashprune/greedy.h"
#include "flashprune/topk.h"

namespace flashprune {

class MaxminPolicy {
 public:
  static constexpr bool kWindowed = false;

  explicit MaxminPolicy(int n) : nearest_(size_t(n), -std::numeric_limits<float>::infinity()) {}

  Key key(int i) const { return make_key(1.0f - nearest_[i], i); }
  void absorb(int i, int, float cosine) { nearest_[i] = std::max(nearest_[i], cosine); }
  void picked(int, int) {}

 private:
  std::vector<float> nearest_;  // largest cosine to a pick
};

// The token whose nearest other token is farthest, by branch and bound: a token's distance to some others bounds its
// distance to the nearest. Blocks of the best bounds are compared with everything that has not been compared with
// everything yet, until the best exact distance beats every bound. At worst half an N x N product; on photographs,
// where most tokens have a close neighbour, far less.
class MostIsolated {
 public:
  MostIsolated(Rows& rows, const ParallelFor& parallel)
      : rows_(rows),
        parallel_(parallel),
        nearest_(size_t(rows.size()), -std::numeric_limits<float>::infinity()),
        block_rows_(kBlock, rows.width()),
        other_rows_(kOthers, rows.width()) {}

  int find() {
    if (rows_.size() == 1) return 0;
    compare_neighbours();
    std::vector<int> open;  // not yet compared with everything
    for (int i = 0; i < rows_.size(); ++i) open.push_back(i);
    Key best = kNoKey;
    for (;;) {
      std::vector<Key> candidates;
      for (int i : open) {
        if (const Key key = bound(i); key > best) candidates.push_back(key);
      }
      if (candidates.empty()) return key_index(best);
      const auto block = std::min<std::ptrdiff_t>(kBlock, std::ptrdiff_t(candidates.size()));
      std::partial_sort(candidates.begin(), candidates.begin() + block, candidates.end(), std::greater<>());
      std::vector<int> tokens(static_cast<size_t>(block));
      std::transform(candidates.begin(), candidates.begin() + block, tokens.begin(), key_index);
      compare(tokens, open);
      for (int i : tokens) best = std::max(best, bound(i));
      std::sort(tokens.begin(), tokens.end());
      std::erase_if(open, [&](int i) { return std::binary_search(tokens.begin(), tokens.end(), i); });
    }
  }

 private:
  static constexpr int kBlock = 96;
  static constexpr int kGroup = 24;
  static constexpr int kOthers = 480;  // rows loaded at a time

  Key bound(int i) const { return make_key(1.0f - nearest_[i], i); }

  // Neighbours in raster order are alike in a picture, so this alone settles most tokens.
  void compare_neighbours() {
    for (int begin = 0; begin + 1 < rows_.size(); begin += kOthers - 1) {
      const int end = std::min(begin + kOthers, rows_.size());
      load(end - begin, [&](int r) { return begin + r; }, other_rows_);
      for (int i = begin; i + 1 < end; ++i) {
        const float* a = other_rows_[i - begin];
        const float* b = other_rows_[i + 1 - begin];
        float cosine;
        kernels().dots(&a, 1, &b, 1, rows_.width(), &cosine, 1);
        nearest_[i] = std::max(nearest_[i], cosine);
        nearest_[i + 1] = std::max(nearest_[i + 1], cosine);
      }
    }
  }

  // Compares each of tokens with each of open, both ways.
  void compare(const std::vector<int>& tokens, const std::vector<int>& open) {
    const int m = int(tokens.size());
    load(m, [&](int r) { return tokens[r]; }, block_rows_);
    std::vector<const float*> block(static_cast<size_t>(m));
    for (int r = 0; r < m; ++r) block[r] = block_rows_[r];
    constexpr int kTasks = kOthers / kGroup;
    std::vector<float> found(size_t(kTasks) * m);  // by task: largest cosine of each block row
    for (int begin = 0; begin < int(open.size()); begin += kOthers) {
      const int count = std::min(kOthers, int(open.size()) - begin);
      const int tasks = (count + kGroup - 1) / kGroup;
      parallel_(tasks, [&](int task) {
        const int first = task * kGroup, rows = std::min(kGroup, count - first);
        const float* others[kGroup];
        for (int r = 0; r < rows; ++r) {
          rows_.load(open[begin + first + r], other_rows_[first + r]);
          others[r] = other_rows_[first + r];
        }
        float cosines[kGroup * kBlock];
        kernels().dots(others, rows, block.data(), m, rows_.width(), cosines, m);
        float* best = &found[size_t(task) * m];
        std::fill_n(best, m, -std::numeric_limits<float>::infinity());
        for (int r = 0; r < rows; ++r) {
          const int i = open[begin + first + r];
          float nearest = nearest_[i];
          for (int s = 0; s < m; ++s) {
            if (tokens[s] == i) continue;
            nearest = std::max(nearest, cosines[r * m + s]);
            best[s] = std::max(best[s], cosines[r * m + s]);
          }
          nearest_[i] = nearest;
        }
      });
      for (int task = 0; task < tasks; ++task) {
        for (int s = 0; s < m; ++s) nearest_[tokens[s]] = std::max(nearest_[tokens[s]], found[size_t(task) * m + s]);
      }
    }
  }

  template <class TokenOf>
  void load(int count, const TokenOf& token_of, RowBuffer& buffer) {
    parallel_((count + kGroup - 1) / kGroup, [&](int task) {
      for (int r = task * kGroup; r < std::min(count, (task + 1) * kGroup); ++r) rows_.load(token_of(r), buffer[r]);
    });
  }

  Rows& rows_;
  const ParallelFor& parallel_;
  std::vector<float> nearest_;  // largest cosine to another token found so far
  RowBuffer block_rows_;
  RowBuffer other_rows_;
};

// k picks of rows, in order. All tokens absorb the first pick before the engine starts: no distance bounds exist
// before.
inline std::vector<int> maxmin_select(Rows& rows, int k, const GreedyOptions& options, const ParallelFor& parallel) {
  if (k == 0) return {};
  MaxminPolicy policy(rows.size());
  Greedy<MaxminPolicy> greedy(rows, policy, k, options, parallel);
  greedy.seed(MostIsolated(rows, parallel).find());
  if (k > 1) {
    const std::vector<int> rest = tokens_without(rows.size(), greedy.picks());
    greedy.absorb_seeds(rest);
    greedy.run(rest);
  }
  return greedy.picks();
}

}  // namespace flashprune
