#include "flashprune/topk.h"

#include "segments.h"

namespace flashprune {

Tensor topk_cpu(const Tensor& scores, const std::vector<int64_t>& k, const std::optional<Tensor>& cu_seqlens,
                bool sort) {
  const Scores values(scores, "scores");
  const Segments segments(scores, scores.dim(), "scores", k, cu_seqlens);
  return segments.run(
      sort, [&](const Segment& s, const ParallelFor&) { return topk_select(values.data(s), int(s.n), int(s.k)); });
}

}  // namespace flashprune

STABLE_TORCH_LIBRARY_IMPL(flashprune, CPU, m) { m.impl("topk_select", TORCH_BOX(&flashprune::topk_cpu)); }
