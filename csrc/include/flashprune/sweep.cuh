// From edges to picks, one block a segment: the chain of an independent set. A panel's candidates go by 64 at a time,
// two barriers each. One warp settles them in rounds of two ballots, as many as the longest chain of neighbours among
// 32, while the other warps' rows of bits are on their way to shared memory; then all other warps add the rows of what
// was kept to the struck candidates, and the first prepares the next 64. P² / 16 bytes of bits for a panel of P.
#pragma once

#include "flashprune/adjacency.cuh"

namespace flashprune::gpu {

inline constexpr int kSweepThreads = 288;  // one warp that settles, eight that strike
inline constexpr int kSweepRows = 64;
inline constexpr int kSweepStages = 3;

// What stands on the other side of the diagonal: bit i of lane j is bit j of lane i.
__device__ __forceinline__ uint32_t warp_transpose(uint32_t bits) {
  uint32_t low = 0x0000ffffu;
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    const uint32_t other = __shfl_xor_sync(kAllLanes, bits, step);
    const bool upper = lane_index() & step;
    bits = upper ? (bits & ~low) | (other & ~low) >> step : (bits & low) | (other & low) << step;
    low ^= low << (step / 2);
  }
  return bits;
}

// 32 candidates, as sets of bits.
struct Settled {
  uint32_t kept;
  uint32_t strikers;
};

// earlier: the lane's neighbours among candidates before it. Of those kept only the first `room` are.
__device__ __forceinline__ Settled settle(uint32_t valid, uint32_t struck, uint32_t earlier, uint32_t pivots,
                                          bool suppress, int room) {
  Settled settled{valid & pivots, suppress ? valid & pivots : 0u};
  uint32_t open = valid & ~struck & ~pivots;
  while (open) {
    const bool mine = open >> lane_index() & 1;
    const bool lost = mine && (earlier & settled.strikers);
    const bool won = mine && !(earlier & (settled.strikers | open));
    const uint32_t winners = __ballot_sync(kAllLanes, won);
    open &= ~(winners | __ballot_sync(kAllLanes, lost));
    settled.kept |= winners;
    settled.strikers |= winners;
  }
  while (__popc(settled.kept) > room) settled.kept &= ~(0x80000000u >> __clz(int(settled.kept)));
  settled.strikers &= settled.kept;
  return settled;
}

// Calls body(index, place) for every set bit of word(0), ..., word(words - 1), place being how many come before it.
// Stops once there were `enough`. By a whole block; memory: [2 * blockDim.x] ints. Returns how many there were.
template <class Word, class Body>
__device__ int for_each_bit(int words, int enough, int* memory, int* scratch, const Word& word, const Body& body) {
  const int threads = int(blockDim.x);
  int passed = 0;
  for (int first = 0; first < words && passed < enough; first += threads) {
    const int w = first + int(threadIdx.x);
    const uint32_t own = w < words ? word(w) : 0u;
    int total;
    const int before = block_exclusive_sum(__popc(own), total, scratch);
    memory[threadIdx.x] = int(own);
    memory[threads + int(threadIdx.x)] = passed + before;
    __syncthreads();
    for (int v = warp_index(); v < min(threads, words - first); v += threads / 32) {
      const uint32_t bits = uint32_t(memory[v]);
      if (bits >> lane_index() & 1) {
        body(32 * (first + v) + lane_index(), memory[threads + v] + __popc(bits & ((1u << lane_index()) - 1)));
      }
    }
    passed += total;
    __syncthreads();
  }
  return passed;
}

struct Sweep {
  Pivots pivots;
  bool sort;
  int32_t* counts;   // [segments]
  int32_t* picks;    // [all tokens]
  uint32_t* taken;   // [bit_words] candidates that were picked
  uint32_t* chosen;  // [bit_words] tokens, for sorting them; null: shared memory has room for an item's
  int64_t* out;
};

struct SweepMemory {
  uint32_t *stages, *struck, *taken, *strikers;
  int *scratch, *count;
  int* words;        // of for_each_bit, where the stages were
  uint32_t* chosen;  // likewise

  __host__ __device__ SweepMemory(Arena& arena, int panel_words, int chosen_words) {
    struck = arena.take<uint32_t>(size_t(panel_words));
    taken = arena.take<uint32_t>(size_t(panel_words));
    strikers = arena.take<uint32_t>(2);
    scratch = arena.take<int>(kMostWarps);
    count = arena.take<int>(1);
    Arena rest = arena;
    stages = arena.take<uint32_t>(size_t(kSweepStages) * kSweepRows * size_t(panel_words));
    words = rest.take<int>(2 * kSweepThreads);
    chosen = rest.take<uint32_t>(size_t(chosen_words));
    if (rest.used() > arena.used()) arena = rest;
  }
};

// The stages of a panel's rows on their way through shared memory; pieces of a row change places so that a column of
// words is read from several banks.
struct SweepRows {
  uint32_t* stages;
  int words;

  __device__ uint32_t* at(int block, int row, int word) const {
    const int piece = word / 4 ^ (row & min(words / 4 - 1, 7));
    return stages + ((block % kSweepStages) * kSweepRows + row) * words + piece * 4 + word % 4;
  }
};

// Settles the candidates of a panel; taken and count are the result. By a whole block.
__device__ __forceinline__ void sweep_panel(const Panel& panel, const Sweep& call, const Segment& segment, int s,
                                            const SweepMemory& memory) {
  const int candidates = panel.candidates(segment.n), blocks = ceil_div(candidates, kSweepRows);
  const int used = ceil_div(candidates, 32);  // words
  const uint32_t* const bits = panel.rows(segment, s);
  const SweepRows rows{memory.stages, panel.words};
  const bool leads = warp_index() == 0;
  const int pivots = call.pivots.of(s) - panel.first;  // of this panel

  // From the words of its own candidates on; what lies before them was never written.
  const auto load = [&](int block) {
    if (block >= blocks) return;
    const int first = block * kSweepRows, own = 2 * block / 4, pieces = ceil_div(used, 4) - own;
    for (int i = int(threadIdx.x); i < kSweepRows * pieces; i += int(blockDim.x)) {
      const int row = i / pieces, word = (own + i % pieces) * 4;
      if (first + row >= candidates) break;
      copy_async_16(rows.at(block, row, word), bits + int64_t(first + row) * panel.words + word);
    }
  };

  uint32_t early[2] = {}, across = 0;  // neighbours of a lane's two candidates before them in the same 32; from 1 to 2
  // What is no earlier neighbour is masked out: whatever the words hold, the rounds end.
  const uint32_t before = (1u << lane_index()) - 1;
  const auto prepare = [&](int block) {
    const int first = block * kSweepRows + lane_index();
    early[0] = before & warp_transpose(first < candidates ? *rows.at(block, lane_index(), 2 * block) : 0u);
    across = first < candidates ? *rows.at(block, lane_index(), 2 * block + 1) : 0u;
    early[1] =
        before & warp_transpose(first + 32 < candidates ? *rows.at(block, lane_index() + 32, 2 * block + 1) : 0u);
  };
  const auto first_bits = [](int count) { return count >= 32 ? ~0u : count <= 0 ? 0u : (1u << count) - 1; };

  load(0);
  copy_async_commit();
  load(1);
  copy_async_commit();
  copy_async_wait<1>();
  __syncthreads();
  if (leads) prepare(0);
  for (int block = 0; block < blocks; ++block) {
    load(block + 2);
    copy_async_commit();
    if (leads) {
      int count = *memory.count;
      uint32_t strikers = 0;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int first = block * kSweepRows + 32 * half, word = 2 * block + half;
        uint32_t struck = memory.struck[word];
        if (half == 1) struck |= __reduce_or_sync(kAllLanes, strikers >> lane_index() & 1 ? across : 0u);
        const Settled settled = settle(first_bits(candidates - first), struck, early[half], first_bits(pivots - first),
                                       call.pivots.suppress, segment.k - count);
        strikers = settled.strikers;
        count += __popc(settled.kept);
        if (lane_index() == 0) {
          memory.taken[word] = settled.kept;
          memory.strikers[half] = strikers;
        }
      }
      __syncwarp();  // all lanes have read the count
      if (lane_index() == 0) *memory.count = count;
    }
    copy_async_wait<1>();
    __syncthreads();
    if (*memory.count >= segment.k) break;
    if (leads) {
      if (block + 1 < blocks) prepare(block + 1);
    } else {
      const int threads = int(blockDim.x) - 32, thread = int(threadIdx.x) - 32;
      const int groups = max(threads / panel.words, 1), group = thread / panel.words;
      const int share = ceil_div(kSweepRows, groups), from = group * share;
      for (int word = 2 * block + 2 + thread % panel.words; word < used && group < groups; word += threads) {
        uint32_t struck = 0;
        for (int half = from / 32; half < 2 && 32 * half < from + share; ++half) {
          uint32_t left = memory.strikers[half] & ~first_bits(from - 32 * half) & first_bits(from + share - 32 * half);
          for (; left; left &= left - 1) struck |= *rows.at(block, 32 * half + __ffs(int(left)) - 1, word);
        }
        if (struck) atomicOr(memory.struck + word, struck);
      }
    }
    __syncthreads();
  }
  copy_async_wait<0>();
  __syncthreads();
}

// One panel of a segment, and all that is left to do once it needs no further one. By a whole block.
__device__ __forceinline__ void sweep_segment(const Panel& panel, const Sweep& call, int s) {
  const Segment segment(panel.all, s);
  const int candidates = panel.candidates(segment.n), before = panel.count(s);
  if (panel.first > 0 && (candidates == 0 || before >= segment.k)) return;  // an earlier panel was its last
  Arena arena(shared_memory());
  const SweepMemory memory(arena, panel.words, 0);
  const size_t word0 = first_word(segment.start, s);
  const int panel_word = panel.first / 32, used = ceil_div(candidates, 32);
  for (int w = int(threadIdx.x); w < panel.words; w += int(blockDim.x)) {
    memory.struck[w] = panel.first > 0 && w < used ? panel.struck[word0 + size_t(panel_word + w)] : 0u;
    memory.taken[w] = 0;
  }
  if (threadIdx.x == 0) *memory.count = before;
  __syncthreads();
  if (candidates > 0 && before < segment.k) sweep_panel(panel, call, segment, s, memory);
  const int count = *memory.count;

  for (int w = int(threadIdx.x); w < used; w += int(blockDim.x)) {
    call.taken[word0 + size_t(panel_word + w)] = memory.taken[w];
  }
  for_each_bit(
      used, segment.n, memory.words, memory.scratch, [&](int w) { return memory.taken[w]; },
      [&](int i, int place) {
        const int token = panel.token(panel.order + panel.first, segment, i);
        call.picks[int64_t(segment.start) + before + place] = token;
        if (!call.sort) call.out[segment.first + before + place] = token + segment.base;
      });
  if (threadIdx.x == 0) call.counts[s] = count;
  if (count < segment.k && panel.first + candidates < segment.n) return;

  // What is missing comes by importance from all that was not picked.
  const int words = ceil_div(segment.n, 32), missing = segment.k - count;
  uint32_t* const chosen = call.chosen ? call.chosen + word0 : memory.chosen;
  if (call.sort) {
    for (int w = int(threadIdx.x); w < words; w += int(blockDim.x)) chosen[w] = 0;
  }
  __syncthreads();
  const auto choose = [&](int token) { atomicOr(chosen + token / 32, 1u << token % 32); };
  if (call.sort) {
    for (int i = int(threadIdx.x); i < count; i += int(blockDim.x)) {
      choose(panel.token(call.picks, segment, i));
    }
  }
  for_each_bit(
      words, missing, memory.words, memory.scratch,
      [&](int w) {
        const uint32_t free = ~call.taken[word0 + size_t(w)];
        return w < segment.n / 32 ? free : free & ((1u << segment.n % 32) - 1);
      },
      [&](int i, int place) {
        if (place >= missing) return;
        const int token = panel.token(panel.order, segment, i);
        if (call.sort) {
          choose(token);
        } else {
          call.out[segment.first + count + place] = token + segment.base;
        }
      });
  int written = segment.k;
  if (call.sort) {
    __syncthreads();
    written = for_each_bit(
        words, segment.k, memory.words, memory.scratch, [&](int w) { return chosen[w]; },
        [&](int token, int place) {
          if (place < segment.k) call.out[segment.first + place] = token + segment.base;
        });
  }
  // Only if cu_seqlens is wrong are there places left.
  for (int i = written + int(threadIdx.x); i < segment.room; i += int(blockDim.x)) call.out[segment.first + i] = 0;
}

template <int kThreads>
__global__ void __launch_bounds__(kThreads, 1) sweep_kernel(Panel panel, Sweep call) {
  sweep_segment(panel, call, int(blockIdx.x));
}

}  // namespace flashprune::gpu
