#include "flashprune/dpp.cuh"

#include "instances.h"
#include "tensors.h"

namespace flashprune::gpu {

Tensor dpp_cuda(const Tensor& features, const Tensor& relevance, const std::vector<int64_t>& k,
                const std::optional<Tensor>& cu_seqlens, bool sort, int64_t block) {
  const FeatureTensor x(features);
  const ScoreTensor scores(relevance, "relevance", x);
  const int size = block_size(block);
  SegmentTensors segments(features, x.token_dims(), "features", k, cu_seqlens);
  CudaStream stream("dpp_select", features);
  Tensor out = segments.new_result();
  if (segments.empty()) return out;
  const DppCall call{x.rows(segments.packed()),      segments.on(stream), scores.scores(segments.packed()), size, sort,
                     out.mutable_data_ptr<int64_t>()};
  with_workspace(x, [&](auto element, unsigned char* memory) { return dpp<decltype(element)>(stream, call, memory); });
  return out;
}

}  // namespace flashprune::gpu

STABLE_TORCH_LIBRARY_IMPL(flashprune, CUDA, m) { m.impl("dpp_select", TORCH_BOX(&flashprune::gpu::dpp_cuda)); }
