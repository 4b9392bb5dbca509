// From tensors to segments and back: what every CPU selector shares.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "flashprune/rows.h"

namespace flashprune {

using torch::stable::Tensor;

// Throws std::invalid_argument, which reaches Python as ValueError.
void check(bool condition, const std::string& message);

// The operators' `block` argument, checked.
int block_size(int64_t block);

// features: [N, D] of one video, in frames of equal size.
void check_frames(const Tensor& features, int64_t frames);

// Tokens that are pruned together.
struct Segment {
  int index;
  int64_t batch;  // item of [B, N, ...]; 0 otherwise
  int64_t begin;  // first token within the item (within [T] when packed)
  int64_t n;
  int64_t k;
  int64_t offset;  // where its picks start in the output
  int64_t base;    // added to a pick to give the index that the caller sees
};

class Segments {
 public:
  // tokens: [N, ...], [B, N, ...] or packed [T, ...], with token_dims leading dimensions (1 or 2) that count tokens.
  Segments(const Tensor& tokens, int64_t token_dims, const char* name, const std::vector<int64_t>& k,
           const std::optional<Tensor>& cu_seqlens);

  const std::vector<Segment>& list() const { return list_; }

  // Runs select(segment, parallel) -> picks in order, for all segments, and returns the public result.
  using Select = std::function<std::vector<int>(const Segment&, const ParallelFor&)>;
  Tensor run(bool sort, const Select& select) const;

 private:
  std::vector<Segment> list_;
  std::vector<int64_t> shape_;  // of the result
  int64_t elements_;            // of the input
};

// features with unit stride along D.
class Features {
 public:
  explicit Features(const Tensor& features);
  int64_t token_dims() const { return tensor_.dim() - 1; }
  const Tensor& tensor() const { return tensor_; }
  Rows rows(const Segment& segment) const;

 private:
  Tensor tensor_;
  DType dtype_;
};

// One score a token, as float32.
class Scores {
 public:
  Scores(const Tensor& scores, const char* name);
  Scores(const Tensor& scores, const char* name, const Features& features);  // also checks the shape
  const Tensor& tensor() const { return tensor_; }
  const float* data(const Segment& segment) const;

 private:
  Tensor tensor_;  // contiguous float32
};

}  // namespace flashprune
