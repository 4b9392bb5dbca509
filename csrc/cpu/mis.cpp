#include "flashprune/mis.h"

#include "segments.h"

namespace flashprune {
namespace {

GraphOptions graph_options(double alpha, double threshold, const std::string& similarity, const std::string& proximity,
                           int64_t radius, double sigma, int64_t temporal_radius) {
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
  return {.alpha = alpha,
          .threshold = threshold,
          .similarity = similarity == "cosine" ? Similarity::kCosine : Similarity::kHalfCosine,
          .proximity = proximity == "chebyshev"  ? Proximity::kChebyshev
                       : proximity == "gaussian" ? Proximity::kGaussian
                                                 : Proximity::kLinear,
          .radius = radius,
          .sigma = sigma,
          .temporal_radius = temporal_radius};
}

void check_positions(const Tensor& positions, const Features& x) {
  check(positions.is_cpu() && positions.scalar_type() == torch::headeronly::ScalarType::Int,
        "positions: expected int32 on the CPU");
  bool same = positions.dim() == x.token_dims() + 1 && positions.size(positions.dim() - 1) == 3;
  for (int64_t d = 0; same && d < x.token_dims(); ++d) same = positions.size(d) == x.tensor().size(d);
  check(same, "positions: expected one (t, y, x) a token of features");
}

std::vector<Position> segment_positions(const Tensor& positions, const Segment& s) {
  const int64_t dims = positions.dim(), token = positions.stride(dims - 2), axis = positions.stride(dims - 1);
  const int32_t* data =
      positions.const_data_ptr<int32_t>() + s.begin * token + (dims == 3 ? s.batch * positions.stride(0) : 0);
  std::vector<Position> out(static_cast<size_t>(s.n));
  for (int64_t i = 0; i < s.n; ++i)
    out[size_t(i)] = {data[i * token], data[i * token + axis], data[i * token + 2 * axis]};
  return out;
}

}  // namespace

Tensor mis_cpu(const Tensor& features, const Tensor& importance, const std::vector<int64_t>& k,
               const std::optional<Tensor>& positions, const std::optional<Tensor>& cu_seqlens, double alpha,
               double threshold, const std::string& similarity, const std::string& proximity, int64_t radius,
               double sigma, int64_t temporal_radius, const std::vector<int64_t>& pivots, bool pivots_suppress,
               bool sort, int64_t block) {
  const Features x(features);
  const Scores scores(importance, "importance", x);
  const Segments segments(features, x.token_dims(), "features", k, cu_seqlens);
  const GraphOptions graph = graph_options(alpha, threshold, similarity, proximity, radius, sigma, temporal_radius);
  check(alpha == 1.0 || positions.has_value(), "positions: needed when alpha < 1");
  if (positions) check_positions(*positions, x);
  check(pivots.size() == k.size(),
        "pivots: expected " + std::to_string(k.size()) + " entries, got " + std::to_string(pivots.size()));
  for (size_t s = 0; s < k.size(); ++s) {
    check(pivots[s] >= 0 && pivots[s] <= k[s],
          "pivots=" + std::to_string(pivots[s]) + " is not in [0, k=" + std::to_string(k[s]) + "]");
  }
  const GreedyOptions options{.block = block_size(block)};
  return segments.run(sort, [&](const Segment& s, const ParallelFor& parallel) -> std::vector<int> {
    if (s.k == 0) return {};
    Rows rows = x.rows(s);
    const Graph edges(graph, alpha < 1.0 ? segment_positions(*positions, s) : std::vector<Position>{});
    const int first = int(pivots[cu_seqlens ? size_t(s.index) : 0]);
    return mis_select(rows, scores.data(s), int(s.k), edges, first, pivots_suppress, options, parallel);
  });
}

}  // namespace flashprune

STABLE_TORCH_LIBRARY_IMPL(flashprune, CPU, m) { m.impl("mis_select", TORCH_BOX(&flashprune::mis_cpu)); }
