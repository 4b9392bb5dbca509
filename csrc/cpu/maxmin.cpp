#include "flashprune/maxmin.h"

#include "segments.h"

namespace flashprune {

Tensor maxmin_cpu(const Tensor& features, const std::vector<int64_t>& k, const std::optional<Tensor>& cu_seqlens,
                  bool sort, int64_t block) {
  const Features x(features);
  const Segments segments(features, x.token_dims(), "features", k, cu_seqlens);
  const GreedyOptions options{.block = block_size(block)};
  return segments.run(sort, [&](const Segment& s, const ParallelFor& parallel) {
    Rows rows = x.rows(s);
    return maxmin_select(rows, int(s.k), options, parallel);
  });
}

}  // namespace flashprune

STABLE_TORCH_LIBRARY_IMPL(flashprune, CPU, m) { m.impl("maxmin_select", TORCH_BOX(&flashprune::maxmin_cpu)); }
