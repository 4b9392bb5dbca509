// How a kernel file starts its kernels, on a GPU (csrc/cuda/stream.h) or on the emulation (csrc/emulation/stream.h).
//
// Each kernel file has, beside its kernels, a host function template over the stream. It works from host integers
// alone: sizes, grids and workspace never depend on data. A Stream gives
//   template <class... P, class... A> void launch(void (*kernel)(P...), const Shape&, A&&... arguments)
//   void zero(void* memory, size_t bytes)
//   int resident_blocks(const void* kernel, int threads, size_t shared_bytes)   of the whole device, at once
//   int multiprocessors()
//   size_t shared_limit()                                                       bytes that a block may ask for
#pragma once

#include <cstddef>

#include "flashprune/cuda.cuh"

namespace flashprune::gpu {

struct Shape {
  dim3 grid;
  int threads;
  size_t shared_bytes = 0;
  bool cooperative = false;  // all blocks are alive at once, so that they may wait for one another
};

// Where the segments of a call are. Lengths of packed segments are known on the device alone.
struct Segments {
  const int32_t* cu_seqlens = nullptr;  // [count + 1]; null: count items of `tokens` tokens each
  const int32_t* starts = nullptr;      // [count + 1] places in the result; null: k each
  int count = 1;
  int tokens = 0;   // of an item, or of all packed segments together
  int k = 0;        // of a segment, or the largest
  int total_k = 0;  // of all segments
};

// Of the whole call.
inline size_t all_tokens(const Segments& segments) {
  return size_t(segments.tokens) * size_t(segments.cu_seqlens ? 1 : segments.count);
}

// One of them, inside the tensors whatever cu_seqlens holds.
struct Segment {
  int start;  // first token, of all tokens of the call
  int n;
  int first;  // first place in the result
  int k;      // at most n
  int room;   // places in the result, which the host counted; more than k only if cu_seqlens is wrong
  int base;   // added to a token of the segment to give the index that the caller sees

  __device__ Segment(const Segments& all, int s) {
    start = s * all.tokens;
    n = all.tokens;
    base = 0;
    if (all.cu_seqlens) {
      start = min(max(all.cu_seqlens[s], 0), all.tokens);
      n = min(max(all.cu_seqlens[s + 1], start), all.tokens) - start;
      base = start;
    }
    first = all.starts ? all.starts[s] : s * all.k;
    room = all.starts ? all.starts[s + 1] - first : all.k;
    k = min(room, n);
  }
};

// Feature rows of a call: [tokens, D] or [items, tokens, D], any strides but the last.
struct Rows {
  const void* data;
  int64_t item_stride, row_stride;  // elements; item_stride is not used for packed segments
  int d;
  bool packed;

  template <class T>
  __device__ const T* segment(const Segment& at, int s) const {
    return static_cast<const T*>(data) + (packed ? at.start * row_stride : s * item_stride);
  }
};

enum class Number { kFloat32, kFloat16, kBFloat16 };

// One score a token: [tokens] or [items, tokens], any type and strides. The type is looked at where a score is read,
// which is the same branch for every thread and saves a kernel for each type.
struct Scores {
  const void* data;
  int64_t item_stride, stride;  // elements; item_stride is not used for packed segments
  Number type;
  bool packed;

  // Those of a segment, stride apart, where the type is known.
  template <class T>
  __device__ const T* segment(const Segment& at, int s) const {
    return static_cast<const T*>(data) + (packed ? at.start * stride : s * item_stride);
  }

  // Of a segment's token i.
  __device__ float at(const Segment& segment, int s, int i) const {
    const int64_t element = packed ? int64_t(segment.start + i) * stride : s * item_stride + i * stride;
    if (type == Number::kFloat32) return static_cast<const float*>(data)[element];
    if (type == Number::kFloat16) return to_float(static_cast<const Half*>(data)[element]);
    return to_float(static_cast<const BFloat16*>(data)[element]);
  }
};

}  // namespace flashprune::gpu
