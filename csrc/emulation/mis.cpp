#include "flashprune/mis.cuh"

#include "emulation/module.h"

namespace flashprune::emulation {
namespace {

// The operator's arguments in its order, but similarity and proximity as numbers; then the sizes. Returns the indices,
// how many kernels were launched, and the bytes of workspace.
py::tuple mis_select(const Numbers& features, const Numbers& importance, const std::vector<int>& k,
                     const std::optional<Ints>& positions, const std::optional<Ints>& cu_seqlens, double alpha,
                     double threshold, const std::string& similarity, const std::string& proximity, int64_t radius,
                     double sigma, int64_t temporal_radius, const std::vector<int>& pivots, bool pivots_suppress,
                     bool sort, int block, int tile, int chunk, size_t shared_bytes, uint64_t seed, int blocks) {
  Stream stream(seed, blocks);
  std::vector<int32_t> starts, pivot_counts(pivots.begin(), pivots.end());
  const bool packed = cu_seqlens.has_value();
  const gpu::Segments all = segments(features, int(features.ndim()) - 1, k, cu_seqlens, starts);
  auto out = poisoned_indices(all.total_k);
  const gpu::Proximity kind = proximity == "chebyshev"  ? gpu::Proximity::kChebyshev
                              : proximity == "gaussian" ? gpu::Proximity::kGaussian
                                                        : gpu::Proximity::kLinear;
  const gpu::EdgeRule rule(alpha, threshold, similarity == "half_cosine", kind, radius, sigma, temporal_radius,
                           positions ? positions->data() : nullptr);
  const gpu::MisCall call{
      all,
      rows(features, packed),
      scores(importance, packed),
      rule,
      {pivots.size() > 1 ? pivot_counts.data() : nullptr, pivots.empty() ? 0 : pivots[0], pivots_suppress},
      sort,
      out.mutable_data(),
      {block, tile, chunk, 128, shared_bytes}};
  const size_t bytes = gpu::mis_workspace(call);
  Poisoned workspace(bytes);
  with_type(features, [&](auto element) { gpu::mis_select<decltype(element)>(stream, call, workspace.get()); });
  return py::make_tuple(out, stream.launches(), bytes);
}

// Bytes of workspace for one item or for packed segments of that many tokens.
size_t mis_workspace(int tokens, int segments, bool packed, bool sort) {
  static const int32_t none = 0;
  gpu::Segments all;
  all.cu_seqlens = packed ? &none : nullptr;
  all.count = segments;
  all.tokens = tokens;
  all.k = all.total_k = 1;
  const gpu::EdgeRule rule(0.5, 0.8, false, gpu::Proximity::kLinear, 1, 1.0, 0, nullptr);
  return gpu::mis_workspace({all, {}, {}, rule, {}, sort, nullptr, {}});
}

const Binding binding([](py::module_& m) {
  using namespace py::literals;
  m.def("mis_select", &mis_select, "features"_a, "importance"_a, "k"_a, "positions"_a, "cu_seqlens"_a, "alpha"_a,
        "threshold"_a, "similarity"_a, "proximity"_a, "radius"_a, "sigma"_a, "temporal_radius"_a, "pivots"_a,
        "pivots_suppress"_a, "sort"_a, "block"_a = 0, "tile"_a = 64, "chunk"_a = gpu::kRankChunk,
        "shared_bytes"_a = gpu::MisSizes{}.shared_bytes, "seed"_a = 0, "blocks"_a = 4);
  m.def("mis_workspace", &mis_workspace, "tokens"_a, "segments"_a, "packed"_a, "sort"_a);
});

}  // namespace
}  // namespace flashprune::emulation
