// Greedy maximal independent set in order of importance, in panels of candidates. Launches: the offsets of packed
// segments; norms and ranks together; from more tokens than a chunk, one to merge the ranks; the first panel's edges;
// its sweep. Where a segment may have more panels, one cooperative launch goes through them, two barriers of the grid a
// panel, and ends once no segment has anything left to pick or to pick from. N·K·D + N·P·D / 2 multiply-adds for N
// candidates, K picks and panels of P. Memory: a panel's P² / 8 bytes of bits a segment, and some 20 bytes a token.
#pragma once

#include <algorithm>

#include "flashprune/adjacency.cuh"
#include "flashprune/rank.cuh"
#include "flashprune/sweep.cuh"
#include "flashprune/team.cuh"

namespace flashprune::gpu {

inline constexpr int kPrepareThreads = 512;
inline constexpr int kLeastPanel = 128, kMostPanel = 4096;  // candidates; powers of two
inline constexpr size_t kMostBits = size_t(64) << 20;       // bytes, beyond which panels are half as large
inline constexpr int kEdgeWaves = 8;                        // blocks of edges for each multiprocessor, at most

// Sizes of the work, which change no pick.
struct MisSizes {
  int panel = 0;           // candidates, rounded up to a power of two from kLeastPanel; 0: chosen
  int tile = 0;            // of cosines: kSmallTile, kLargeTile, or 0: chosen
  int chunk = kRankChunk;  // tokens sorted together, a power of two from 64
  int prepare_threads = kPrepareThreads;
  size_t shared_bytes = size_t(99) << 10;  // that the marks of a sorted result may fill up: what every GPU has
};

struct MisCall {
  Segments all;
  Rows rows;
  Scores importance;
  EdgeRule rule;
  Pivots pivots;
  bool sort;
  int64_t* out;
  MisSizes sizes;
};

inline size_t panel_rows(const Segments& all, int panel) {
  if (all.cu_seqlens) return size_t(all.tokens);
  return size_t(all.count) * size_t(all.tokens < panel ? all.tokens : panel);
}

inline int panel_size(const Segments& all, int wanted) {
  const int candidates = wanted > 0 ? wanted : all.tokens;
  int panel = kLeastPanel;
  while (panel < kMostPanel && panel < candidates) panel *= 2;
  return panel == kMostPanel && panel_rows(all, panel) * size_t(panel) / 8 > kMostBits ? panel / 2 : panel;
}

// The workspace, dealt out; without a base only its size.
struct MisMemory {
  float* inverse;
  int32_t *offsets, *order, *picks, *counts;
  Key* keys = nullptr;
  double* diagonals = nullptr;
  uint32_t *bits, *taken, *chosen = nullptr;
  uint32_t* struck = nullptr;  // and the counter of a barrier after it, where there may be several panels
  size_t bytes;

  // A token's bit each, of one item, that the last sweep keeps in shared memory.
  static int shared_chosen_words(const MisCall& call, int panel) {
    const int words = ceil_div(call.all.tokens, 32);
    return call.sort && sweep_bytes(panel, words) <= call.sizes.shared_bytes ? words : 0;
  }
  static size_t sweep_bytes(int panel, int chosen_words) {
    Arena arena;
    const SweepMemory memory(arena, panel / 32, chosen_words);
    return arena.used();
  }

  MisMemory(const MisCall& call, int panel, void* base) {
    Arena arena(static_cast<unsigned char*>(base));
    const size_t tokens = all_tokens(call.all), segments = size_t(call.all.count), words = bit_words(call.all);
    inverse = arena.take<float>(tokens);
    offsets = arena.take<int32_t>(offset_count(call.all));
    order = arena.take<int32_t>(tokens);
    picks = arena.take<int32_t>(tokens);
    counts = arena.take<int32_t>(segments);
    if (call.all.tokens > call.sizes.chunk) keys = arena.take<Key>(tokens);
    if (call.rule.linear()) diagonals = arena.take<double>(segments);
    bits = arena.take<uint32_t>(panel_rows(call.all, panel) * size_t(panel / 32));
    taken = arena.take<uint32_t>(words);
    if (call.all.tokens > panel) struck = arena.take<uint32_t>(words + 1);
    if (call.sort && shared_chosen_words(call, panel) == 0) chosen = arena.take<uint32_t>(words);
    bytes = arena.used();
  }
};

// The first blocks sort a chunk of a segment each, the others take the norm of a row a warp.
template <class T>
__global__ void __launch_bounds__(kPrepareThreads)
    prepare_kernel(Segments all, Rows rows, Scores importance, bool aligned, EdgeRule rule, int chunk, int rank_blocks,
                   int64_t tokens, float* inverse, Key* keys, int32_t* order) {
  if (int(blockIdx.x) >= rank_blocks) {
    const int64_t token = (int64_t(blockIdx.x) - rank_blocks) * (blockDim.x / 32) + warp_index();
    if (token < tokens) write_inverse_norm<T>(rows, all.tokens, token, aligned, inverse);
    return;
  }
  Arena arena(shared_memory());
  Key* const sorted = arena.take<Key>(size_t(chunk));
  int* const bounds = arena.take<int>(4 * kMostWarps);
  const Unit unit = locate(all, int(blockIdx.x), [&](int n) { return (n + chunk - 1) / chunk; });
  if (unit.segment < 0) return;
  if (rule.diagonals && unit.index == 0) write_diagonal(all, unit.segment, rule, bounds);
  rank_chunk(all, importance, unit, chunk, sorted, keys, order);
}

// All panels but the first. What they add to `panel` is their first candidate. At most three blocks a multiprocessor
// where there are products: with four, registers beyond those of a tile would spill.
template <class T, int kTile, bool kFew>
__global__ void __launch_bounds__(2 * kTile, kFew ? EdgeTile<T, kTile, kFew>::kBlocks
                                                  : std::min(EdgeTile<T, kTile, kFew>::kBlocks, 3))
    later_panels_kernel(Panel panel, Graph graph, Sweep call, uint32_t* barrier) {
  Team grid(barrier, int(gridDim.x));
  for (;;) {
    panel.first += panel.size();
    bool open = false;
    for (int s = int(threadIdx.x); s < panel.all.count; s += int(blockDim.x)) {
      const Segment segment(panel.all, s);
      open |= segment.n > panel.first && panel.counts[s] < segment.k;
    }
    if (!__syncthreads_or(open)) return;  // all blocks see the same
    edge_tiles<T, kTile, kFew, true>(panel, graph);
    edge_tiles<T, kTile, kFew, false>(panel, graph);
    grid.sync();
    for (int s = int(blockIdx.x); s < panel.all.count; s += int(gridDim.x)) {
      sweep_segment(panel, call, s);
      __syncthreads();
    }
    grid.sync();
  }
}

inline size_t mis_workspace(const MisCall& call) {
  return MisMemory(call, panel_size(call.all, call.sizes.panel), nullptr).bytes;
}

template <class T, int kTile, bool kFew, class Stream>
void sweep_panels(Stream& stream, const Panel& panel, const Graph& graph, const Sweep& call, size_t sweep_bytes) {
  const Segments& all = panel.all;
  const size_t tile_bytes = EdgeTile<T, kTile, kFew>::shared_bytes();
  const int blocks = min(most_triangles(all, kTile, panel.size()), kEdgeWaves * stream.multiprocessors());
  stream.launch(edges_kernel<T, kTile, kFew>, Shape{dim3{unsigned(blocks), 1, 1}, 2 * kTile, tile_bytes}, panel, graph);
  stream.launch(sweep_kernel<kSweepThreads>, Shape{dim3{unsigned(all.count), 1, 1}, kSweepThreads, sweep_bytes}, panel,
                call);
  if (all.tokens <= panel.size()) return;
  const auto later = later_panels_kernel<T, kTile, kFew>;
  Shape shape{dim3{1, 1, 1}, 2 * kTile, tile_bytes > sweep_bytes ? tile_bytes : sweep_bytes, true};
  shape.grid.x = unsigned(stream.resident_blocks(later, shape.threads, shape.shared_bytes));
  stream.launch(later, shape, panel, graph, call, panel.struck + bit_words(all));
}

// workspace: mis_workspace bytes, 16-byte aligned.
template <class T, class Stream>
void mis_select(Stream& stream, MisCall call, void* workspace) {
  const Segments& all = call.all;
  if (all.total_k == 0 || all_tokens(all) == 0) return;
  const int size = panel_size(all, call.sizes.panel), chunk = call.sizes.chunk;
  const MisMemory memory(call, size, workspace);
  call.all = ascending(stream, call.all, memory.offsets);
  call.rule.diagonals = memory.diagonals;
  const bool aligned = aligned_rows(call.rows, sizeof(T));

  const int rank_blocks = most_chunks(all, chunk), warps = call.sizes.prepare_threads / 32;
  const int64_t tokens = int64_t(all_tokens(all));
  Arena shared;
  shared.take<Key>(size_t(chunk));
  shared.take<int>(4 * kMostWarps);
  stream.launch(prepare_kernel<T>,
                Shape{dim3{unsigned(rank_blocks + (tokens + warps - 1) / warps), 1, 1}, call.sizes.prepare_threads,
                      shared.used()},
                all, call.rows, call.importance, aligned, call.rule, chunk, rank_blocks, tokens, memory.inverse,
                memory.keys, memory.order);
  merge_ranks(stream, all, chunk, memory.keys, memory.order);
  if (memory.struck) stream.zero(memory.struck, (bit_words(all) + 1) * sizeof(uint32_t));

  const Panel panel{all, 0, size / 32, memory.bits, memory.order, memory.counts, memory.picks, memory.struck};
  const Graph graph{call.rows, memory.inverse, aligned, call.rule, call.pivots};
  const Sweep sweep{call.pivots, call.sort, memory.counts, memory.picks, memory.taken, memory.chosen, call.out};
  const size_t sweep_bytes = MisMemory::sweep_bytes(size, MisMemory::shared_chosen_words(call, size));
  const int64_t window = call.rule.window();
  const int tile = call.sizes.tile > 0 ? call.sizes.tile : choose_tile(stream, all, size);
  if (window >= 0 && window <= kFewPlaces) {
    sweep_panels<T, kSmallTile, true>(stream, panel, graph, sweep, sweep_bytes);
  } else if (tile == kLargeTile) {
    sweep_panels<T, kLargeTile, false>(stream, panel, graph, sweep, sweep_bytes);
  } else {
    sweep_panels<T, kSmallTile, false>(stream, panel, graph, sweep, sweep_bytes);
  }
}

}  // namespace flashprune::gpu
