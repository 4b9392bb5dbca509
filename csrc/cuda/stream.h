// Starts kernels on torch's current stream of a device, with the interface of include/flashprune/launch.cuh. Every call
// is checked, and the error names the operator.
#pragma once

#ifndef __CUDACC__
#include "emulation/cuda_stream.h"
#else

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>
#include <utility>

#include "flashprune/launch.cuh"

namespace flashprune::gpu {

class CudaStream {
 public:
  // on: a tensor of the device, which is the current one until the end of this object.
  CudaStream(const char* op, const torch::stable::Tensor& on);

  template <class... P, class... A>
  void launch(void (*kernel)(P...), const Shape& shape, A&&... arguments) {
    std::tuple<P...> values(std::forward<A>(arguments)...);
    std::apply(
        [&](P&... each) {
          void* pointers[] = {&each...};
          launch(reinterpret_cast<const void*>(kernel), shape, pointers);
        },
        values);
  }

  void zero(void* memory, size_t bytes);

  // Blocks of a kernel that the whole device holds at once.
  template <class... P>
  int resident_blocks(void (*kernel)(P...), int threads, size_t shared_bytes) {
    return resident_blocks(reinterpret_cast<const void*>(kernel), threads, shared_bytes);
  }

  int multiprocessors() const { return multiprocessors_; }
  size_t shared_limit() const { return shared_limit_; }  // bytes that a block may ask for

 private:
  void launch(const void* kernel, const Shape& shape, void** arguments);
  int resident_blocks(const void* kernel, int threads, size_t shared_bytes);
  void allow_shared(const void* kernel, size_t bytes);
  void check(cudaError_t error, const char* what) const;

  const char* const op_;
  const int device_;
  const torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
  int multiprocessors_ = 0;
  size_t shared_limit_ = 0;
};

inline bool on_gpu(const torch::stable::Tensor& tensor) { return tensor.is_cuda(); }

}  // namespace flashprune::gpu

#endif
