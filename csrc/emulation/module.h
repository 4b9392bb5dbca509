// What the bindings of the emulated kernels share: registration, arrays as kernels want them, poisoned results.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <functional>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "emulation/stream.h"

namespace flashprune::emulation {

namespace py = pybind11;

inline std::vector<std::function<void(py::module_&)>>& bindings() {
  static std::vector<std::function<void(py::module_&)>> all;
  return all;
}

// static const Binding binding([](py::module_& m) { m.def(...); });
struct Binding {
  explicit Binding(std::function<void(py::module_&)> bind) { bindings().push_back(std::move(bind)); }
};

// An array of floating numbers: float32, float16, or uint16 with the bits of bfloat16; any strides but the last.
using Numbers = py::array;
using Ints = py::array_t<int32_t, py::array::c_style>;

// Calls body(T{}) for the element type of an array.
template <class Body>
auto with_type(const Numbers& array, const Body& body) {
  const char kind = array.dtype().kind();
  const auto size = array.itemsize();
  if (kind == 'f' && size == 4) return body(float{});
  if (kind == 'f' && size == 2) return body(gpu::Half{});
  if (kind == 'u' && size == 2) return body(gpu::BFloat16{});
  throw std::invalid_argument("expected float32, float16, or uint16 with the bits of bfloat16");
}

// Memory of exactly the size asked for, so that a sanitizer sees what lies beyond, holding noise.
class Poisoned {
 public:
  explicit Poisoned(size_t bytes) : data_(new unsigned char[bytes]) { std::memset(data_.get(), 0xa5, bytes); }
  unsigned char* get() { return data_.get(); }

 private:
  std::unique_ptr<unsigned char[]> data_;
};

inline py::array_t<int64_t> poisoned_indices(int64_t count) {
  py::array_t<int64_t> out(count);
  std::fill_n(out.mutable_data(), count, int64_t(-7777777));
  return out;
}

// [tokens, D] or [items, tokens, D].
inline gpu::Rows rows(const Numbers& features, bool packed) {
  const auto dims = features.ndim();
  const auto stride = [&](py::ssize_t d) { return int64_t(features.strides(d) / features.itemsize()); };
  if (dims < 2 || dims > 3 || (features.size() > 0 && features.shape(dims - 1) > 1 && stride(dims - 1) != 1)) {
    throw std::invalid_argument("features: expected [N, D] or [B, N, D] with adjacent elements");
  }
  return {features.data(), dims == 3 ? stride(0) : 0, stride(dims - 2), int(features.shape(dims - 1)), packed};
}

// [tokens] or [items, tokens].
inline gpu::Scores scores(const Numbers& values, bool packed) {
  const auto dims = values.ndim();
  if (dims < 1 || dims > 2) throw std::invalid_argument("scores: expected [N] or [B, N]");
  const auto stride = [&](py::ssize_t d) { return int64_t(values.strides(d) / values.itemsize()); };
  const gpu::Number type = with_type(values, [](auto element) {
    using T = decltype(element);
    return std::is_same_v<T, float>       ? gpu::Number::kFloat32
           : std::is_same_v<T, gpu::Half> ? gpu::Number::kFloat16
                                          : gpu::Number::kBFloat16;
  });
  return {values.data(), dims == 2 ? stride(0) : 0, stride(dims - 1), type, packed};
}

// tokens: the array whose leading dimensions count tokens, token_dims of them; starts: filled where budgets differ.
inline gpu::Segments segments(const Numbers& tokens, int token_dims, const std::vector<int>& k,
                              const std::optional<Ints>& cu_seqlens, std::vector<int32_t>& starts) {
  gpu::Segments all;
  all.tokens = int(tokens.shape(token_dims - 1));
  all.count = cu_seqlens ? int(k.size()) : token_dims == 2 ? int(tokens.shape(0)) : 1;
  all.cu_seqlens = cu_seqlens ? cu_seqlens->data() : nullptr;
  if (cu_seqlens && cu_seqlens->size() != all.count + 1) throw std::invalid_argument("k: expected one a segment");
  bool ragged = false;
  starts.assign(1, 0);
  for (int s = 0; s < all.count; ++s) {
    const int own = k[cu_seqlens ? size_t(s) : 0];
    ragged |= own != k[0];
    all.k = std::max(all.k, own);
    starts.push_back(starts.back() + own);
  }
  all.total_k = starts.back();
  all.starts = ragged ? starts.data() : nullptr;
  return all;
}

}  // namespace flashprune::emulation
