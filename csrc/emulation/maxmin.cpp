#include "flashprune/maxmin.cuh"

#include "emulation/module.h"

namespace flashprune::emulation {

static const Binding binding([](py::module_& m) {
  m.def(
      "maxmin_select",
      [](const Numbers& features, const std::vector<int>& k, const std::optional<Ints>& cu_seqlens, bool sort,
         int block, bool stored, uint64_t seed, int blocks, int threads) {
        Stream stream(seed, blocks);
        std::vector<int32_t> starts;
        const gpu::Segments all = segments(features, int(features.ndim()) - 1, k, cu_seqlens, starts);
        auto out = poisoned_indices(all.total_k);
        const gpu::MaxminCall call{rows(features, cu_seqlens.has_value()),
                                   all,
                                   block,
                                   sort,
                                   out.mutable_data(),
                                   stored ? gpu::Cosines::kStored : gpu::Cosines::kComputed,
                                   threads};
        with_type(features, [&](auto element) {
          using T = decltype(element);
          Poisoned workspace(gpu::maxmin<T>(stream, call, nullptr));
          gpu::maxmin<T>(stream, call, workspace.get());
        });
        return out;
      },
      py::arg("features"), py::arg("k"), py::arg("cu_seqlens"), py::arg("sort"), py::kw_only(), py::arg("block") = 0,
      py::arg("stored") = false, py::arg("seed") = 0, py::arg("blocks") = 1, py::arg("threads") = 128);
});

}  // namespace flashprune::emulation
