// Maximal Marginal Relevance (IDPruner, arXiv 2602.13315, Algorithm 1).
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "flashprune/greedy.h"
#include "flashprune/topk.h"

namespace flashprune {

class MmrPolicy {
 public:
  static constexpr bool kWindowed = false;

  MmrPolicy(const float* importance, int n, double lam)
      : importance_(importance),
        importance_weight_(float(lam)),
        similarity_weight_(float(1.0 - lam)),
        nearest_(size_t(n), -std::numeric_limits<float>::infinity()) {}

  Key key(int i) const { return make_key(importance_weight_ * importance_[i] - similarity_weight_ * nearest_[i], i); }
  void absorb(int i, int, float cosine) { nearest_[i] = std::max(nearest_[i], cosine); }
  void picked(int, int) {}

 private:
  const float* importance_;
  float importance_weight_, similarity_weight_;
  std::vector<float> nearest_;  // largest cosine to a pick
};

// k picks of rows, in order. The first round goes by importance alone, and all tokens absorb it before the engine
// starts: a first cosine below 0 raises a score, later ones never do.
inline std::vector<int> mmr_select(Rows& rows, const float* importance, int k, double lam, const GreedyOptions& options,
                                   const ParallelFor& parallel) {
  if (k == 0) return {};
  MmrPolicy policy(importance, rows.size(), lam);
  Greedy<MmrPolicy> greedy(rows, policy, k, options, parallel);
  const std::vector<int> seeds = topk_select(importance, rows.size(), std::min(k, options.per_round));
  for (int i : seeds) greedy.seed(i);
  if (int(seeds.size()) < k) {
    const std::vector<int> rest = tokens_without(rows.size(), seeds);
    greedy.absorb_seeds(rest);
    greedy.run(rest);
  }
  return greedy.picks();
}

}  // namespace flashprune
