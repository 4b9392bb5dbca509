// flashprune._emulation: the CUDA kernels on the host emulation, and the CPU engine's arithmetic, on NumPy arrays, for
// the tests. One file an op beside this one binds it.
#include "emulation/module.h"

PYBIND11_MODULE(_emulation, m) {
  m.doc() = "The CUDA kernels of flashprune on a CPU, for its tests.";
  m.def("launches", &flashprune::emulation::Stream::last_launches, "How many kernels the last call has launched.");
  for (const auto& bind : flashprune::emulation::bindings()) bind(m);
}
