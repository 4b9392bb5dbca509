// flashprune._build: the facts of the build, for `flashprune info` and for bug reports, and the arithmetic of each
// instruction set on NumPy arrays, for the tests. The operators themselves are registered by the libraries, which do
// not depend on Python; this module does.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "flashprune/rows.h"

namespace py = pybind11;

namespace {

std::vector<std::string> split(const std::string& names) {
  std::vector<std::string> out;
  std::istringstream stream(names);
  for (std::string name; std::getline(stream, name, ',');) out.push_back(name);
  return out;
}

py::object or_none(const std::string& text) {
  if (text.empty()) return py::none();
  return py::str(text);
}

py::dict facts() {
  py::dict facts;
  facts["version"] = FLASHPRUNE_VERSION;
  facts["system"] = FLASHPRUNE_SYSTEM;
  facts["compiler"] = FLASHPRUNE_COMPILER;
  facts["instruction_sets"] = split(FLASHPRUNE_INSTRUCTION_SETS);
  facts["torch"] = FLASHPRUNE_TORCH_VERSION;
  facts["torch_target"] = "2.11";
  facts["nvcc"] = or_none(FLASHPRUNE_NVCC_VERSION);
  facts["cuda_architectures"] = split(FLASHPRUNE_CUDA_ARCHITECTURES);
  facts["cuda_missing"] = or_none(FLASHPRUNE_CUDA_MISSING);
  return facts;
}

using flashprune::DType;
using flashprune::Kernels;
using flashprune::RowBuffer;
using Floats = py::array_t<float, py::array::c_style | py::array::forcecast>;

const Kernels& table(const std::string& name) {
  for (const Kernels* kernels : flashprune::runnable_kernels()) {
    if (name == kernels->name) return *kernels;
  }
  throw std::invalid_argument("instruction set '" + name + "' does not run here");
}

std::vector<std::string> runnable() {
  std::vector<std::string> names;
  for (const Kernels* kernels : flashprune::runnable_kernels()) names.push_back(kernels->name);
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
  std::vector<float> padded(size_t(flashprune::row_stride(bits.size())));
  table(isa).load(bits.data(), dtype == "float16" ? DType::kFloat16 : DType::kBFloat16, bits.size(), padded.data());
  return Floats(bits.size(), padded.data());
}

}  // namespace

PYBIND11_MODULE(_build, m) {
  m.doc() = "Facts of this build of flashprune.";
  m.def("facts", &facts,
        "A new dict of the build's facts: compiler, instruction sets, torch, nvcc, CUDA architectures.");
  m.def("runnable", &runnable, "Instruction sets of this build that this processor runs, fastest first.");
  m.def("dots", &dots, "Products of the rows of a [m, d] and b [n, d], float32, by the given instruction set.");
  m.def("widen", &widen, "float32 of the bits of float16 or bfloat16 numbers, by the given instruction set.");
}
