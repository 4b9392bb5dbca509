// flashprune._build: the facts of the build, for `flashprune info` and for bug reports. The operators themselves are
// registered by the libraries, which do not depend on Python; this module does.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

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

}  // namespace

PYBIND11_MODULE(_build, m) {
  m.doc() = "Facts of this build of flashprune.";
  m.def("facts", &facts,
        "A new dict of the build's facts: compiler, instruction sets, torch, nvcc, CUDA architectures.");
}
