// The tokens of each segment from most to least important, ties by index. Chunks of a segment are sorted in shared
// memory, a block each; where there are several, a second kernel adds up a token's places in them, by binary search. 16
// bytes of memory traffic a token, or with several chunks 32 and the searches.
#pragma once

#include "flashprune/locate.cuh"

namespace flashprune::gpu {

inline constexpr int kRankChunk = 4096;
inline constexpr int kMergeThreads = 256;

// Sorts one chunk, a power of two from 64: into order if it is all of its segment, else into keys. By a whole block.
// keys, order: [all tokens]; order counts from the segment's first token.
__device__ __forceinline__ void rank_chunk(const Segments& all, const Scores& scores, const Unit& unit, int chunk,
                                           Key* sorted, Key* keys, int32_t* order) {
  const Segment segment(all, unit.segment);
  const int first = unit.index * chunk, count = min(chunk, segment.n - first);
  int size = 64;
  while (size < count) size *= 2;
  for (int i = int(threadIdx.x); i < size; i += int(blockDim.x)) {
    sorted[i] = i < count ? make_key(scores.at(segment, unit.segment, first + i), first + i) : kNoKey;
  }
  block_sort_descending(sorted, size);
  const int64_t to = int64_t(segment.start) + first;
  for (int i = int(threadIdx.x); i < count; i += int(blockDim.x)) {
    if (segment.n > chunk) {
      keys[to + i] = sorted[i];
    } else {
      order[to + i] = key_index(sorted[i]);
    }
  }
}

// How many of the descending keys are greater.
__device__ __forceinline__ int count_greater(const Key* keys, int count, Key key) {
  int low = 0;
  while (low < count) {
    const int middle = low + (count - low) / 2;
    if (keys[middle] > key) {
      low = middle + 1;
    } else {
      count = middle;
    }
  }
  return low;
}

template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    merge_ranks_kernel(Segments all, int chunk, const Key* keys, int32_t* order) {
  const Unit unit = locate(all, int(blockIdx.x), [&](int n) { return n > chunk ? ceil_div(n, kThreads) : 0; });
  if (unit.segment < 0) return;
  const Segment segment(all, unit.segment);
  const int i = unit.index * kThreads + int(threadIdx.x);
  if (i >= segment.n) return;
  const Key* const own = keys + segment.start;
  const Key key = own[i];
  int rank = i % chunk;
  for (int first = 0; first < segment.n; first += chunk) {
    if (first != i / chunk * chunk) rank += count_greater(own + first, min(chunk, segment.n - first), key);
  }
  order[int64_t(segment.start) + min(rank, segment.n - 1)] = key_index(key);
}

// After every chunk was sorted; launches nothing where no segment can have several.
template <class Stream>
void merge_ranks(Stream& stream, const Segments& all, int chunk, const Key* keys, int32_t* order) {
  if (all.tokens <= chunk) return;
  const unsigned blocks = unsigned(most_chunks(all, kMergeThreads));
  stream.launch(merge_ranks_kernel<kMergeThreads>, Shape{dim3{blocks, 1, 1}, kMergeThreads}, all, chunk, keys, order);
}

}  // namespace flashprune::gpu
