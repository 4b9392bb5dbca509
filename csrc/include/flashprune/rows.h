// Feature rows of one segment: where they lie, and normalised copies of the few that a step needs.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <new>
#include <vector>

#include "flashprune/kernels.h"

namespace flashprune {

// Calls body(0) ... body(tasks - 1), in any order, on up to `threads` threads at once. Before each, poll: it throws if
// the call is to stop.
struct ParallelFor {
  int threads;
  std::function<void(int tasks, const std::function<void(int)>& body)> run;
  std::function<void()> poll;

  void operator()(int tasks, const std::function<void(int)>& body) const {
    run(tasks, [&](int task) {
      poll();
      body(task);
    });
  }
};

// Scratch of `count` normalised rows. Memory is untouched until written, so a generous count costs only address space.
class RowBuffer {
 public:
  RowBuffer(int64_t count, int64_t d) : stride_(row_stride(d)) {
    const size_t bytes = size_t(count > 0 ? count : 1) * size_t(stride_) * sizeof(float);
    data_.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
    if (!data_) throw std::bad_alloc();
  }
  float* operator[](int64_t row) { return data_.get() + row * stride_; }
  const float* operator[](int64_t row) const { return data_.get() + row * stride_; }

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  int64_t stride_;
  std::unique_ptr<float, Free> data_;
};

// 0 where the squared norm is not finite or below the smallest normal float, where its rounding would show.
inline float inverse_norm(float squared) {
  return squared >= FLT_MIN && std::isfinite(squared) ? 1.0f / std::sqrt(squared) : 0.0f;
}

// features [N, D] of one segment. The pair's cosine is the dot product of two rows that `load` wrote.
class Rows {
 public:
  Rows(const void* data, DType dtype, int64_t n, int64_t d, int64_t stride_elements)
      : data_(static_cast<const char*>(data)),
        stride_bytes_(stride_elements * (dtype == DType::kFloat32 ? 4 : 2)),
        dtype_(dtype),
        n_(int(n)),
        d_(d),
        inverse_norm_(size_t(n), -1.0f) {}

  int size() const { return n_; }
  int64_t width() const { return d_; }

  // Writes row i as it is.
  void read(int i, float* out) const { kernels().load(data_ + i * stride_bytes_, dtype_, d_, out); }

  // Writes row i divided by its norm; zeros where inverse_norm is 0. Safe for different i at once.
  void load(int i, float* out) {
    const Kernels& kernel = kernels();
    read(i, out);
    if (inverse_norm_[i] < 0.0f) {
      float squared;
      kernel.dots(&out, 1, &out, 1, d_, &squared, 1);
      inverse_norm_[i] = inverse_norm(squared);
    }
    // Zeros are written, not multiplied: 0 * inf is NaN.
    if (inverse_norm_[i] == 0.0f) {
      std::fill_n(out, row_stride(d_), 0.0f);
    } else {
      kernel.scale(out, d_, inverse_norm_[i]);
    }
  }

  // Whether row i is known, from an earlier load, to have no direction: its cosine is 0 to all.
  bool known_zero(int i) const { return inverse_norm_[i] == 0.0f; }

 private:
  const char* data_;
  int64_t stride_bytes_;
  DType dtype_;
  int n_;
  int64_t d_;
  std::vector<float> inverse_norm_;  // -1: not computed yet
};

}  // namespace flashprune
