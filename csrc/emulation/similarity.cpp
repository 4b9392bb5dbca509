// The wide stages: norms, nearest other tokens, all cosines.
#include "flashprune/similarity.cuh"

#include "emulation/module.h"

namespace flashprune::emulation {
namespace {

struct Call {
  Call(const Numbers& features, const std::optional<Ints>& cu_seqlens, uint64_t seed, int blocks)
      : stream(seed, blocks), rows(emulation::rows(features, cu_seqlens.has_value())) {
    const std::vector<int> k(cu_seqlens ? size_t(cu_seqlens->size() - 1) : 1, 0);
    all = segments(features, int(features.ndim()) - 1, k, cu_seqlens, starts);
    tokens = py::ssize_t(gpu::all_tokens(all));
  }
  Stream stream;
  gpu::Rows rows;
  gpu::Segments all;
  std::vector<int32_t> starts;
  py::ssize_t tokens;
};

py::array_t<float> poisoned_floats(std::vector<py::ssize_t> shape) {
  py::array_t<float> out(std::move(shape));
  std::fill_n(out.mutable_data(), out.size(), -7777777.0f);
  return out;
}

py::array_t<float> inverse_norms(const Numbers& features, const std::optional<Ints>& cu_seqlens, uint64_t seed,
                                 int blocks) {
  Call call(features, cu_seqlens, seed, blocks);
  py::array_t<float> out = poisoned_floats({call.tokens});
  with_type(features, [&](auto type) {
    gpu::inverse_norms<decltype(type)>(call.stream, call.all, call.rows, out.mutable_data());
  });
  return out;
}

py::array_t<float> nearest_other(const Numbers& features, const py::array_t<float>& inverse,
                                 const std::optional<Ints>& cu_seqlens, int tile, uint64_t seed, int blocks) {
  Call call(features, cu_seqlens, seed, blocks);
  std::vector<uint32_t> bits(size_t(call.tokens), 0xa5a5a5a5u);
  with_type(features, [&](auto type) {
    gpu::all_pairs<decltype(type)>(call.stream, call.all, call.rows, inverse.data(), bits.data(), nullptr, tile);
  });
  py::array_t<float> out = poisoned_floats({call.tokens});
  for (py::ssize_t i = 0; i < call.tokens; ++i) out.mutable_data()[i] = gpu::from_ordered_bits(bits[size_t(i)]);
  return out;
}

py::array_t<float> cosine_matrix(const Numbers& features, const py::array_t<float>& inverse,
                                 const std::optional<Ints>& cu_seqlens, int tile, uint64_t seed, int blocks) {
  Call call(features, cu_seqlens, seed, blocks);
  py::array_t<float> out = poisoned_floats({call.tokens, call.all.tokens});
  with_type(features, [&](auto type) {
    gpu::all_pairs<decltype(type)>(call.stream, call.all, call.rows, inverse.data(), nullptr, out.mutable_data(), tile);
  });
  return out;
}

const Binding binding([](py::module_& m) {
  using namespace py::literals;
  m.def("inverse_norms", &inverse_norms, "features"_a, "cu_seqlens"_a = py::none(), "seed"_a = 0, "blocks"_a = 4);
  m.def("nearest_other", &nearest_other, "features"_a, "inverse"_a, "cu_seqlens"_a = py::none(), "tile"_a = 0,
        "seed"_a = 0, "blocks"_a = 4);
  m.def("cosine_matrix", &cosine_matrix, "features"_a, "inverse"_a, "cu_seqlens"_a = py::none(), "tile"_a = 0,
        "seed"_a = 0, "blocks"_a = 4);
});

}  // namespace
}  // namespace flashprune::emulation
