// The CPU engine's arithmetic, by each instruction set, on NumPy arrays.
#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "emulation/module.h"
#include "flashprune/rows.h"

namespace flashprune::emulation {
namespace {

using Floats = py::array_t<float, py::array::c_style | py::array::forcecast>;

const Kernels& table(const std::string& name) {
  for (const Kernels* kernels : runnable_kernels()) {
    if (name == kernels->name) return *kernels;
  }
  throw std::invalid_argument("instruction set '" + name + "' does not run here");
}

std::vector<std::string> runnable() {
  std::vector<std::string> names;
  for (const Kernels* kernels : runnable_kernels()) names.push_back(kernels->name);
  return names;
}

// Scratch rows of a [rows, d] array.
RowBuffer scratch(const Kernels& kernels, const Floats& array, std::vector<const float*>& pointers) {
  RowBuffer rows(array.shape(0), array.shape(1));
  for (py::ssize_t i = 0; i < array.shape(0); ++i) {
    kernels.load(array.data(i, 0), DType::kFloat32, array.shape(1), rows[i]);
    pointers.push_back(rows[i]);
  }
  return rows;
}

Floats dots(const std::string& isa, const Floats& a, const Floats& b) {
  if (a.ndim() != 2 || b.ndim() != 2 || a.shape(1) != b.shape(1)) {
    throw std::invalid_argument("a, b: expected float32 [m, d] and [n, d]");
  }
  const Kernels& kernels = table(isa);
  std::vector<const float*> a_rows, b_rows;
  const RowBuffer a_scratch = scratch(kernels, a, a_rows), b_scratch = scratch(kernels, b, b_rows);
  Floats out({a.shape(0), b.shape(0)});
  std::fill_n(out.mutable_data(), out.size(), -7.0f);  // poison
  kernels.dots(a_rows.data(), int(a.shape(0)), b_rows.data(), int(b.shape(0)), a.shape(1), out.mutable_data(),
               b.shape(0));
  return out;
}

Floats widen(const std::string& isa, const py::array_t<uint16_t, py::array::c_style>& bits, const std::string& dtype) {
  std::vector<float> padded(size_t(row_stride(bits.size())));
  table(isa).load(bits.data(), dtype == "float16" ? DType::kFloat16 : DType::kBFloat16, bits.size(), padded.data());
  return Floats(bits.size(), padded.data());
}

const Binding binding([](py::module_& m) {
  m.def("runnable", &runnable, "Instruction sets of this build that this processor runs, fastest first.");
  m.def("dots", &dots, "Products of the rows of a [m, d] and b [n, d], float32, by the given instruction set.");
  m.def("widen", &widen, "float32 of the bits of float16 or bfloat16 numbers, by the given instruction set.");
});

}  // namespace
}  // namespace flashprune::emulation
