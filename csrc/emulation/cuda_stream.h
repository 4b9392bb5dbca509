// What csrc/cuda/stream.h is under a C++ compiler: the operators of csrc/cuda take CPU tensors and run on the
// emulation. They register themselves apart, as torch.ops.flashprune_emulated, so that the tests reach the host files
// as well.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "emulation/stream.h"

#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(library, key, m) _STABLE_TORCH_LIBRARY_IMPL(flashprune_emulated, CPU, m, C10_UID)

namespace flashprune::gpu {

class CudaStream : public emulation::Stream {
 public:
  CudaStream(const char*, const torch::stable::Tensor&) : Stream(0, 4) {}
};

inline bool on_gpu(const torch::stable::Tensor& tensor) { return tensor.is_cpu(); }

}  // namespace flashprune::gpu
