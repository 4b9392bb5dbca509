#include "flashprune/dpp.h"

#include "segments.h"

namespace flashprune {

Tensor dpp_cpu(const Tensor& features, const Tensor& relevance, const std::vector<int64_t>& k,
               const std::optional<Tensor>& cu_seqlens, bool sort, int64_t block) {
  const Features x(features);
  const Scores scores(relevance, "relevance", x);
  const Segments segments(features, x.token_dims(), "features", k, cu_seqlens);
  const GreedyOptions options{.block = block_size(block)};
  return segments.run(sort, [&](const Segment& s, const ParallelFor& parallel) {
    Rows rows = x.rows(s);
    return dpp_select(rows, scores.data(s), int(s.k), options, parallel);
  });
}

}  // namespace flashprune

STABLE_TORCH_LIBRARY_IMPL(flashprune, CPU, m) { m.impl("dpp_select", TORCH_BOX(&flashprune::dpp_cpu)); }
