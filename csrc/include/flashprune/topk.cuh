// The k highest scores of each segment, in the total order: one block a segment, one launch.
//
// The block keeps the ordered bits of its scores in shared memory and finds the k-th largest digit by digit: at most
// four histograms of 8 bits, each over those that agree with the digits found so far, and a barrier each. Then every
// warp counts, in its own stretch of tokens, those above that score and those equal to it, and writes the former and
// the first of the latter in order of index. Rank order sorts the picks' keys in shared memory. A segment too long for
// shared memory is read again in each pass; more picks than can be sorted at once are sorted in parts and merged by
// rank, two more launches.
#pragma once

#include <algorithm>

#include "flashprune/block.cuh"
#include "flashprune/launch.cuh"

namespace flashprune::gpu {

inline constexpr int kTopkSorted = 8192;  // keys sorted in shared memory: 64 KB
inline constexpr int kTopkStaged = 8192;  // scores kept there of one segment of many: 32 KB
inline constexpr int kTopkThreads = 1024;

// How a call is run; any numbers give the same picks.
struct TopkPlan {
  int threads;     // of a block
  int staged;      // scores that are kept in shared memory; a longer segment's are read again
  int sorted;      // keys that are sorted at once, a power of two from 64
  bool ascending;  // indices, which need no sorting
  bool parts;      // more than `sorted` picks

  static constexpr int kDigits = 256, kPasses = 4;

  // Shared memory, in the order that the kernel takes it.
  struct Shared {
    uint32_t* counts;  // [kPasses, kDigits], before the keys are there
    Key* keys;         // [sorted], in the same place
    int* scratch;      // [2, kMostWarps]
    uint32_t* bits;    // [staged]
    size_t bytes;
  };
  __host__ __device__ Shared shared(unsigned char* base) const {
    Arena arena(base);
    Shared found;
    found.keys = arena.take<Key>(size_t(max(ascending || parts ? 0 : sorted, kPasses * kDigits / 2)));
    found.counts = reinterpret_cast<uint32_t*>(found.keys);
    found.scratch = arena.take<int>(2 * kMostWarps);
    found.bits = arena.take<uint32_t>(size_t(staged));
    found.bytes = arena.used();
    return found;
  }
};

inline TopkPlan topk_plan(const Segments& all, bool ascending, size_t shared_limit) {
  TopkPlan plan{};
  const int typical = all.cu_seqlens ? all.tokens / max(all.count, 1) : all.tokens;
  plan.threads = typical <= 512 ? 256 : typical <= 2048 ? 512 : kTopkThreads;
  plan.ascending = ascending;
  plan.sorted = 64;
  while (plan.sorted < min(all.k, kTopkSorted)) plan.sorted *= 2;
  plan.parts = !ascending && all.k > plan.sorted;
  const int room = int((shared_limit - plan.shared(nullptr).bytes) / sizeof(uint32_t));
  plan.staged = min(all.tokens, all.cu_seqlens && all.count > 1 ? min(room, kTopkStaged) : room);
  return plan;
}

inline size_t topk_workspace(const Segments& all, const TopkPlan& plan) {
  return plan.parts ? size_t(all.total_k) * sizeof(Key) : 0;
}

// Calls use(i, whether i < end, load(i)) for i = begin + lane, begin + lane + step, ...; four loads are in flight. All
// lanes of a warp make the same calls.
template <class Load, class Use>
__device__ __forceinline__ void for_each_token(int begin, int end, int step, const Load& load, const Use& use) {
  constexpr int kAtOnce = 4;
  for (int at = begin; at < end; at += kAtOnce * step) {
    uint32_t bits[kAtOnce];
    for (int j = 0; j < kAtOnce; ++j) {
      const int i = at + j * step + lane_index();
      bits[j] = i < end ? load(i) : 0;
    }
    for (int j = 0; j < kAtOnce; ++j) {
      const int i = at + j * step + lane_index();
      use(i, i < end, bits[j]);
    }
  }
}

// The picks' scores: above `prefix` in the bits of `known`, or equal to it and among the first `left` such.
struct TopkThreshold {
  uint32_t prefix = 0, known = 0;
  int left;
};

// Narrows the threshold by the next digit, whose counts are in shared memory: digit d at (d % 8) * 32 + d / 8, so that
// the lanes read eight digits each without conflicts. Every warp does the same. Returns whether all is known.
__device__ __forceinline__ bool narrow(TopkThreshold& threshold, int shift, const uint32_t* counts) {
  const int group = 31 - lane_index();  // of digits, the highest first
  int of[8], sum = 0;
  for (int j = 0; j < 8; ++j) sum += of[j] = int(counts[j * 32 + group]);
  const int inclusive = warp_inclusive_sum(sum);
  int above = inclusive - sum, digit = 0, left = 0, count = 0;
  bool found = false;
  for (int j = 7; j >= 0; --j) {
    if (!found && above + of[j] >= threshold.left) {
      found = true;
      digit = group * 8 + j;
      left = threshold.left - above;
      count = of[j];
    }
    above += of[j];
  }
  const int lane = __ffs(int(__ballot_sync(kAllLanes, inclusive >= threshold.left))) - 1;
  threshold.prefix |= uint32_t(__shfl_sync(kAllLanes, digit, lane)) << shift;
  threshold.known |= 255u << shift;
  threshold.left = __shfl_sync(kAllLanes, left, lane);
  return threshold.left == __shfl_sync(kAllLanes, count, lane);
}

// keys: where picks are left for sorting in parts.
template <class T>
__global__ void __launch_bounds__(kTopkThreads, 1)
    topk_kernel(Segments all, Scores scores, TopkPlan plan, Key* keys, int64_t* out) {
  const TopkPlan::Shared shared = plan.shared(shared_memory());
  const int thread = int(threadIdx.x), threads = int(blockDim.x);
  const int s = int(blockIdx.x);
  const Segment at(all, s);
  out += at.first;
  for (int i = at.k + thread; i < at.room; i += threads) out[i] = 0;
  if (at.k == 0) return;

  const T* const values = scores.segment<T>(at, s);
  const bool staged = at.n <= plan.staged;
  const auto read = [&](int i) { return ordered_bits(to_float(values[i * scores.stride])); };
  const auto load = [&](int i) { return staged ? shared.bits[i] : read(i); };
  const int warp_begin = warp_index() * 32;
  if (staged) {
    for_each_token(warp_begin, at.n, threads, read, [&](int i, bool valid, uint32_t bits) {
      if (valid) shared.bits[i] = bits;
    });
  }
  for (int i = thread; i < TopkPlan::kPasses * TopkPlan::kDigits; i += threads) shared.counts[i] = 0;
  __syncthreads();

  TopkThreshold threshold{.left = at.k};
  bool done = at.k == at.n;
  for (int pass = 0; pass < TopkPlan::kPasses && !done; ++pass) {
    const int shift = 24 - 8 * pass;
    uint32_t* const counts = shared.counts + pass * TopkPlan::kDigits;
    for_each_token(warp_begin, at.n, threads, load, [&](int, bool valid, uint32_t bits) {
      const uint32_t digit = bits >> shift & 255u;
      if (valid && (bits & threshold.known) == threshold.prefix) atomicAdd(&counts[digit % 8 * 32 + digit / 8], 1u);
    });
    __syncthreads();
    done = narrow(threshold, shift, counts);
  }

  const int warps = threads / 32, part = (at.n + threads - 1) / threads * 32;  // tokens of a warp
  const int begin = min(warp_index() * part, at.n), end = min(begin + part, at.n);
  int above = 0, equal = 0;
  for_each_token(begin, end, 32, load, [&](int, bool valid, uint32_t bits) {
    above += valid && (bits & threshold.known) > threshold.prefix;
    equal += valid && (bits & threshold.known) == threshold.prefix;
  });
  above = __reduce_add_sync(kAllLanes, above);
  equal = __reduce_add_sync(kAllLanes, equal);
  if (lane_index() == 0) {
    shared.scratch[warp_index()] = above;
    shared.scratch[kMostWarps + warp_index()] = equal;
  }
  __syncthreads();  // also between the counts and the keys in their place
  const bool before = lane_index() < warps && lane_index() < warp_index();
  above = __reduce_add_sync(kAllLanes, before ? shared.scratch[lane_index()] : 0);
  equal = __reduce_add_sync(kAllLanes, before ? shared.scratch[kMostWarps + lane_index()] : 0);

  const uint32_t lower_lanes = (1u << lane_index()) - 1;
  for_each_token(begin, end, 32, load, [&](int i, bool valid, uint32_t bits) {
    const bool is_above = valid && (bits & threshold.known) > threshold.prefix;
    const bool is_equal = valid && (bits & threshold.known) == threshold.prefix;
    const uint32_t above_lanes = __ballot_sync(kAllLanes, is_above), equal_lanes = __ballot_sync(kAllLanes, is_equal);
    const int rank = equal + __popc(equal_lanes & lower_lanes);
    const int place = above + __popc(above_lanes & lower_lanes) + min(rank, threshold.left);
    if (is_above || (is_equal && rank < threshold.left)) {
      const Key key = Key(bits) << 32 | Key(~uint32_t(i));
      if (plan.ascending) {
        out[place] = at.base + i;
      } else if (plan.parts) {
        keys[at.first + place] = key;
      } else {
        shared.keys[place] = key;
      }
    }
    above += __popc(above_lanes);
    equal += __popc(equal_lanes);
  });
  if (plan.ascending || plan.parts) return;

  int size = 64;
  while (size < at.k) size *= 2;
  for (int i = at.k + thread; i < size; i += threads) shared.keys[i] = kNoKey;
  block_sort_descending(shared.keys, size);
  for (int i = thread; i < at.k; i += threads) out[i] = at.base + key_index(shared.keys[i]);
}

// Sorts each part of a segment's keys.
template <int kThreads>
__global__ void __launch_bounds__(kThreads, 1) topk_sort_kernel(Segments all, TopkPlan plan, Key* keys) {
  Key* const sorted = reinterpret_cast<Key*>(shared_memory());
  const Segment at(all, int(blockIdx.x));
  const int begin = int(blockIdx.y) * plan.sorted, count = min(at.k - begin, plan.sorted);
  if (count <= 0) return;
  keys += at.first + begin;
  for (int i = int(threadIdx.x); i < plan.sorted; i += int(blockDim.x)) sorted[i] = i < count ? keys[i] : kNoKey;
  block_sort_descending(sorted, plan.sorted);
  for (int i = int(threadIdx.x); i < count; i += int(blockDim.x)) keys[i] = sorted[i];
}

// Puts every key of the sorted parts in its place: those before it in its own part, and in each other part by
// bisection.
template <int kThreads>
__global__ void __launch_bounds__(kThreads, 1)
    topk_merge_kernel(Segments all, TopkPlan plan, const Key* keys, int64_t* out) {
  const Segment at(all, int(blockIdx.x));
  const int i = int(blockIdx.y * blockDim.x + threadIdx.x);
  if (i >= at.k) return;
  keys += at.first;
  const Key key = keys[i];
  int place = i % plan.sorted;
  for (int part = 0; part < at.k; part += plan.sorted) {
    if (part == i - i % plan.sorted) continue;
    int low = part, high = min(part + plan.sorted, at.k);  // the first key of the part that is smaller
    while (low < high) {
      const int middle = (low + high) / 2;
      if (keys[middle] > key) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    place += low - part;
  }
  out[at.first + place] = at.base + key_index(key);
}

// out: [total_k], ascending indices or the best first, as the plan says.
template <class Stream>
void topk_select(Stream& stream, const Segments& all, const Scores& scores, const TopkPlan& plan, void* workspace,
                 int64_t* out) {
  if (all.total_k == 0) return;
  Key* const keys = static_cast<Key*>(workspace);
  const unsigned count = unsigned(all.count);
  const Shape shape{dim3{count, 1, 1}, plan.threads, plan.shared(nullptr).bytes};
  const auto kernel = scores.type == Number::kFloat32   ? topk_kernel<float>
                      : scores.type == Number::kFloat16 ? topk_kernel<Half>
                                                        : topk_kernel<BFloat16>;
  stream.launch(kernel, shape, all, scores, plan, keys, out);
  if (!plan.parts) return;
  const unsigned parts = unsigned((all.k + plan.sorted - 1) / plan.sorted);
  const Shape sort{dim3{count, parts, 1}, plan.threads, size_t(plan.sorted) * sizeof(Key)};
  stream.launch(topk_sort_kernel<kTopkThreads>, sort, all, plan, keys);
  const Shape merge{dim3{count, unsigned((all.k + plan.threads - 1) / plan.threads), 1}, plan.threads};
  stream.launch(topk_merge_kernel<kTopkThreads>, merge, all, plan, keys, out);
}

}  // namespace flashprune::gpu
