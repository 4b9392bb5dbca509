#include "flashprune/dpp.cuh"

#include "emulation/module.h"

namespace flashprune::emulation {

static const Binding binding([](py::module_& m) {
  m.def(
      "dpp_select",
      [](const Numbers& features, const Numbers& relevance, const std::vector<int>& k,
         const std::optional<Ints>& cu_seqlens, bool sort, int block, uint64_t seed, int blocks, int threads) {
        Stream stream(seed, blocks);
        std::vector<int32_t> starts;
        const gpu::Segments all = segments(features, int(features.ndim()) - 1, k, cu_seqlens, starts);
        auto out = poisoned_indices(all.total_k);
        const bool packed = cu_seqlens.has_value();
        const gpu::DppCall call{rows(features, packed), all,    scores(relevance, packed), block, sort,
                                out.mutable_data(),     threads};
        with_type(features, [&](auto element) {
          using T = decltype(element);
          Poisoned workspace(gpu::dpp<T>(stream, call, nullptr));
          gpu::dpp<T>(stream, call, workspace.get());
        });
        return out;
      },
      py::arg("features"), py::arg("relevance"), py::arg("k"), py::arg("cu_seqlens"), py::arg("sort"), py::kw_only(),
      py::arg("block") = 0, py::arg("seed") = 0, py::arg("blocks") = 1, py::arg("threads") = 128);
});

}  // namespace flashprune::emulation
