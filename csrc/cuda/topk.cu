#include "flashprune/topk.cuh"

#include "tensors.h"

namespace flashprune::gpu {

Tensor topk_cuda(const Tensor& scores, const std::vector<int64_t>& k, const std::optional<Tensor>& cu_seqlens,
                 bool sort) {
  const ScoreTensor values(scores, "scores");
  SegmentTensors segments(scores, scores.dim(), "scores", k, cu_seqlens);
  CudaStream stream("topk_select", scores);
  Tensor out = segments.new_result();
  if (segments.empty()) return out;
  const Segments all = segments.on(stream);
  const TopkPlan plan = topk_plan(all, sort, stream.shared_limit());
  const Tensor workspace = new_workspace(scores, topk_workspace(all, plan));
  topk_select(stream, all, values.scores(segments.packed()), plan, workspace.mutable_data_ptr(),
              out.mutable_data_ptr<int64_t>());
  return out;
}

}  // namespace flashprune::gpu

STABLE_TORCH_LIBRARY_IMPL(flashprune, CUDA, m) { m.impl("topk_select", TORCH_BOX(&flashprune::gpu::topk_cuda)); }
