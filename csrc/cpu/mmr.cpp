#include "flashprune/mmr.h"

#include "segments.h"

namespace flashprune {

Tensor mmr_cpu(const Tensor& features, const Tensor& importance, const std::vector<int64_t>& k,
               const std::optional<Tensor>& cu_seqlens, double lam, int64_t per_round, bool sort, int64_t block) {
  const Features x(features);
  const Scores scores(importance, "importance", x);
  const Segments segments(features, x.token_dims(), "features", k, cu_seqlens);
  check(lam >= 0.0 && lam <= 1.0, "lam: expected a number in [0, 1], got " + std::to_string(lam));
  check(per_round >= 1 && per_round <= INT32_MAX, "per_round: expected at least 1, got " + std::to_string(per_round));
  const GreedyOptions options{.block = block_size(block), .per_round = int(per_round)};
  return segments.run(sort, [&](const Segment& s, const ParallelFor& parallel) {
    Rows rows = x.rows(s);
    return mmr_select(rows, scores.data(s), int(s.k), lam, options, parallel);
  });
}

}  // namespace flashprune

STABLE_TORCH_LIBRARY_IMPL(flashprune, CPU, m) { m.impl("mmr_select", TORCH_BOX(&flashprune::mmr_cpu)); }
