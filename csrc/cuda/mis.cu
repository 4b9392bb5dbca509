#include "flashprune/mis.cuh"

#include "tensors.h"

namespace flashprune::gpu {
namespace {

EdgeRule edge_rule(double alpha, double threshold, const std::string& similarity, const std::string& proximity,
                   int64_t radius, double sigma, int64_t temporal_radius, const int32_t* positions) {
  check(alpha >= 0.0 && alpha <= 1.0, "alpha: expected a number in [0, 1], got " + std::to_string(alpha));
  check(threshold == threshold, "threshold: expected a number, got NaN");
  check(similarity == "cosine" || similarity == "half_cosine",
        "similarity: expected 'cosine' or 'half_cosine', got '" + similarity + "'");
  check(proximity == "chebyshev" || proximity == "gaussian" || proximity == "linear",
        "proximity: expected 'chebyshev', 'gaussian' or 'linear', got '" + proximity + "'");
  check(radius >= 0 && radius <= INT32_MAX, "radius: expected 0 or more, got " + std::to_string(radius));
  check(sigma > 0.0, "sigma: expected a positive number, got " + std::to_string(sigma));
  check(temporal_radius >= 0 && temporal_radius <= INT32_MAX,
        "temporal_radius: expected 0 or more, got " + std::to_string(temporal_radius));
  const Proximity kind = proximity == "chebyshev"  ? Proximity::kChebyshev
                         : proximity == "gaussian" ? Proximity::kGaussian
                                                   : Proximity::kLinear;
  return EdgeRule(alpha, threshold, similarity == "half_cosine", kind, radius, sigma, temporal_radius, positions);
}

}  // namespace

Tensor mis_cuda(const Tensor& features, const Tensor& importance, const std::vector<int64_t>& k,
                const std::optional<Tensor>& positions, const std::optional<Tensor>& cu_seqlens, double alpha,
                double threshold, const std::string& similarity, const std::string& proximity, int64_t radius,
                double sigma, int64_t temporal_radius, const std::vector<int64_t>& pivots, bool pivots_suppress,
                bool sort, int64_t block) {
  const FeatureTensor x(features);
  const ScoreTensor scores(importance, "importance", x);
  const int size = block_size(block);
  SegmentTensors segments(features, x.token_dims(), "features", k, cu_seqlens);
  check(alpha == 1.0 || positions.has_value(), "positions: needed when alpha < 1");
  check(pivots.size() == k.size(),
        "pivots: expected " + std::to_string(k.size()) + " entries, got " + std::to_string(pivots.size()));
  bool ragged = false;
  for (size_t s = 0; s < k.size(); ++s) {
    check(pivots[s] >= 0 && pivots[s] <= k[s],
          "pivots=" + std::to_string(pivots[s]) + " is not in [0, k=" + std::to_string(k[s]) + "]");
    ragged |= pivots[s] != pivots[0];
  }
  std::optional<Tensor> places;
  if (positions) places = check_positions(*positions, x);
  const EdgeRule rule = edge_rule(alpha, threshold, similarity, proximity, radius, sigma, temporal_radius,
                                  places ? places->const_data_ptr<int32_t>() : nullptr);

  CudaStream stream("mis_select", features);
  Tensor out = segments.new_result();
  if (segments.empty()) return out;
  const Segments all = segments.on(stream);
  Pivots first{nullptr, int(pivots[0]), pivots_suppress};
  std::optional<Tensor> of_segment;
  if (ragged) {
    of_segment = device_ints(stream, std::vector<int32_t>(pivots.begin(), pivots.end()), features);
    first.of_segment = of_segment->const_data_ptr<int32_t>();
  }
  const MisCall call{all,
                     x.rows(segments.packed()),
                     scores.scores(segments.packed()),
                     rule,
                     first,
                     sort,
                     out.mutable_data_ptr<int64_t>(),
                     {.panel = size}};
  const Tensor workspace = new_workspace(features, mis_workspace(call));
  x.with_type([&](auto element) { mis_select<decltype(element)>(stream, call, workspace.mutable_data_ptr()); });
  return out;
}

}  // namespace flashprune::gpu

STABLE_TORCH_LIBRARY_IMPL(flashprune, CUDA, m) { m.impl("mis_select", TORCH_BOX(&flashprune::gpu::mis_cuda)); }
