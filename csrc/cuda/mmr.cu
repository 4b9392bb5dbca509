#include "flashprune/mmr.cuh"

#include "instances.h"
#include "tensors.h"

namespace flashprune::gpu {

Tensor mmr_cuda(const Tensor& features, const Tensor& importance, const std::vector<int64_t>& k,
                const std::optional<Tensor>& cu_seqlens, double lam, int64_t per_round, bool sort, int64_t block) {
  const FeatureTensor x(features);
  const ScoreTensor scores(importance, "importance", x);
  check(lam >= 0.0 && lam <= 1.0, "lam: expected a number in [0, 1], got " + std::to_string(lam));
  check(per_round >= 1 && per_round <= INT32_MAX, "per_round: expected at least 1, got " + std::to_string(per_round));
  const int size = block_size(block);
  SegmentTensors segments(features, x.token_dims(), "features", k, cu_seqlens);
  CudaStream stream("mmr_select", features);
  Tensor out = segments.new_result();
  if (segments.empty()) return out;
  const MmrCall call{x.rows(segments.packed()),
                     segments.on(stream),
                     scores.scores(segments.packed()),
                     lam,
                     int(per_round),
                     size,
                     sort,
                     out.mutable_data_ptr<int64_t>()};
  with_workspace(x, [&](auto element, unsigned char* memory) { return mmr<decltype(element)>(stream, call, memory); });
  return out;
}

}  // namespace flashprune::gpu

STABLE_TORCH_LIBRARY_IMPL(flashprune, CUDA, m) { m.impl("mmr_select", TORCH_BOX(&flashprune::gpu::mmr_cuda)); }
