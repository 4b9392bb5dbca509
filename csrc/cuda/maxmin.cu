#include "flashprune/maxmin.cuh"

#include "instances.h"
#include "tensors.h"

namespace flashprune::gpu {

Tensor maxmin_cuda(const Tensor& features, const std::vector<int64_t>& k, const std::optional<Tensor>& cu_seqlens,
                   bool sort, int64_t block) {
  const FeatureTensor x(features);
  const int size = block_size(block);
  SegmentTensors segments(features, x.token_dims(), "features", k, cu_seqlens);
  CudaStream stream("maxmin_select", features);
  Tensor out = segments.new_result();
  if (segments.empty()) return out;
  const MaxminCall call{x.rows(segments.packed()), segments.on(stream), size, sort, out.mutable_data_ptr<int64_t>()};
  with_workspace(x,
                 [&](auto element, unsigned char* memory) { return maxmin<decltype(element)>(stream, call, memory); });
  return out;
}

}  // namespace flashprune::gpu

STABLE_TORCH_LIBRARY_IMPL(flashprune, CUDA, m) { m.impl("maxmin_select", TORCH_BOX(&flashprune::gpu::maxmin_cuda)); }
