// Greedy MAP of a determinantal point process (CDPruner, arXiv 2506.10967; Chen et al. 2018, arXiv 1709.05135).
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "flashprune/greedy.h"
#include "flashprune/topk.h"

namespace flashprune {

// A token is spent when its gain has fallen to this share of its own kernel entry: the float32 noise floor.
inline constexpr float kDppRankTolerance = 1e-5f;

// Kernel L_ij = r_i cos(i, j) r_j. Incremental Cholesky, lazily: token i holds its row c_i of the factor up to the last
// pick it has absorbed. The factor is N x K floats, of which only absorbed entries are ever touched.
class DppPolicy {
 public:
  static constexpr bool kWindowed = false;

  DppPolicy(const Rows& rows, const float* relevance, int k)
      : rows_(rows),
        relevance_(relevance),
        k_(k),
        gain_(size_t(rows.size())),
        factor_(new float[size_t(rows.size()) * size_t(k)]) {
    for (int i = 0; i < rows.size(); ++i) gain_[i] = relevance[i] * relevance[i];
  }

  Key key(int i) const {
    const float whole = relevance_[i] * relevance_[i];
    const bool has_gain = gain_[i] > kDppRankTolerance * whole && !rows_.known_zero(i);  // false for NaN
    return has_gain ? make_key(gain_[i], i) : kNoKey;
  }

  void absorb(int i, int t, float cosine) {
    const Pick& pick = picks_[size_t(t)];
    float* row = factor_row(i);
    const float kernel = relevance_[pick.token] * cosine * relevance_[i];
    const float e = (kernel - kernels().dot(factor_row(pick.token), row, t)) / pick.root;
    row[t] = e;
    gain_[i] -= e * e;
  }

  void picked(int i, int) { picks_.push_back({i, std::sqrt(gain_[i])}); }

 private:
  struct Pick {
    int token;
    float root;  // sqrt of its gain when picked
  };

  float* factor_row(int i) const { return factor_.get() + size_t(i) * size_t(k_); }

  const Rows& rows_;
  const float* relevance_;
  const int k_;
  std::vector<float> gain_;
  std::unique_ptr<float[]> factor_;
  std::vector<Pick> picks_;
};

// k picks of rows, in order; by relevance once no token has a gain left.
inline std::vector<int> dpp_select(Rows& rows, const float* relevance, int k, const GreedyOptions& options,
                                   const ParallelFor& parallel) {
  if (k == 0) return {};
  DppPolicy policy(rows, relevance, k);
  Greedy<DppPolicy> greedy(rows, policy, k, options, parallel);
  greedy.run(tokens_without(rows.size(), {}));
  std::vector<int> picks = greedy.picks();
  fill_by_score(relevance, rows.size(), k, picks);
  return picks;
}

}  // namespace flashprune
