// From tensors to what the kernels take, and back: what every CUDA operator shares. The checks raise
// std::invalid_argument, which reaches Python as ValueError. The values of cu_seqlens are on the device and are not
// looked at: the kernels stay inside the tensors whatever they are.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "flashprune/launch.cuh"
#include "stream.h"

namespace flashprune::gpu {

using torch::stable::Tensor;

void check(bool condition, const std::string& message);

// Features [N, D], [B, N, D] or packed [T, D], any strides: copied if the last one is not 1.
class FeatureTensor {
 public:
  explicit FeatureTensor(const Tensor& features);
  const Tensor& tensor() const { return tensor_; }
  int64_t token_dims() const { return tensor_.dim() - 1; }
  Rows rows(bool packed) const;

  // Calls body(T{}) for the element type.
  template <class Body>
  void with_type(const Body& body) const {
    switch (type_) {
      case Number::kFloat32:
        return body(float{});
      case Number::kFloat16:
        return body(Half{});
      case Number::kBFloat16:
        return body(BFloat16{});
    }
  }

 private:
  Tensor tensor_;
  Number type_;
};

// One score a token, [N], [B, N] or packed [T], any type and strides.
class ScoreTensor {
 public:
  ScoreTensor(const Tensor& scores, const char* name);
  ScoreTensor(const Tensor& scores, const char* name, const FeatureTensor& features);  // also checks the shape
  const Tensor& tensor() const { return tensor_; }
  Scores scores(bool packed) const;

 private:
  Tensor tensor_;
  Number type_;
};

// The segments of a call; holds what the device reads of them.
class SegmentTensors {
 public:
  // tokens: [N, ...], [B, N, ...] or packed [T, ...], with token_dims leading dimensions (1 or 2) that count tokens.
  SegmentTensors(const Tensor& tokens, int64_t token_dims, const char* name, const std::vector<int64_t>& k,
                 const std::optional<Tensor>& cu_seqlens);

  bool packed() const { return cu_seqlens_.has_value(); }
  bool empty() const { return all_.total_k == 0; }  // nothing to choose, hence nothing to launch

  // The int64 result with its public shape, not filled.
  Tensor new_result() const;

  // For the kernels; launches one that takes budgets which differ to the device.
  Segments on(CudaStream& stream);

 private:
  Tensor tokens_;
  Segments all_;
  std::optional<Tensor> cu_seqlens_, starts_;
  std::vector<int32_t> host_starts_;  // empty if the budgets are equal
  std::vector<int64_t> shape_;        // of the result
};

// int32 positions (t, y, x) of every token, features.shape[:-1] + [3], on its device; contiguous.
Tensor check_positions(const Tensor& positions, const FeatureTensor& features);

// int32 [values.size()] on the device of `like`, without waiting for it.
Tensor device_ints(CudaStream& stream, const std::vector<int32_t>& values, const Tensor& like);

// uint8 [bytes] on the device of `like`, or the caller's buffer where use_workspace has named one (workspace.cu).
Tensor new_workspace(const Tensor& like, size_t bytes);

// The operators' `block` argument, checked.
int block_size(int64_t block);

// Gives a call its workspace: call(T{}, memory) tells the bytes that it takes and, with memory, runs.
template <class Call>
void with_workspace(const FeatureTensor& features, const Call& call) {
  features.with_type([&](auto element) {
    const Tensor workspace = new_workspace(features.tensor(), call(element, nullptr));
    call(element, static_cast<unsigned char*>(workspace.mutable_data_ptr()));
  });
}

}  // namespace flashprune::gpu
