// The edges of an independent set, a bit a pair, among tokens in order of importance. `adjacency` takes the pairs of
// one panel of candidates: half of the square, P²·D flops for P of them. `strike` takes a panel with the picks of
// earlier panels. Cosines come in tiles from tensor cores; a tile none of whose pairs can be an edge, whatever its
// cosine, costs its places only. Where few pairs can (small windows of a banded graph), each is a product of two rows
// by a warp. Of a pair the more important token is the row.
#pragma once

#include <type_traits>

#include "flashprune/graph.cuh"
#include "flashprune/similarity.cuh"

namespace flashprune::gpu {

// Places that are possible for one token, up to which pairs are multiplied one by one. It depends on the rule alone, so
// that a pair has one value whatever the sizes are.
inline constexpr int64_t kFewPlaces = 25;

// How many of the most important are kept beforehand.
struct Pivots {
  const int32_t* of_segment = nullptr;  // [segments]; null: `each` for every one
  int each = 0;
  bool suppress = false;  // whether they strike

  __device__ int of(int s) const { return of_segment ? of_segment[s] : each; }
};

// Words of one bit a token begin here for a segment, in a buffer of `bit_words`.
__host__ __device__ inline size_t first_word(int start, int segment) { return size_t(start) / 32 + size_t(segment); }
inline size_t bit_words(const Segments& all) { return all_tokens(all) / 32 + size_t(all.count) + 1; }

// One panel of every segment: its candidates `first` to `first + 32 * words`.
struct Panel {
  Segments all;
  int first, words;
  uint32_t* bits;         // rows of `words`, one a candidate: its edges to later ones of the panel
  const int32_t* order;   // [all tokens] the segments' tokens by importance
  const int32_t* counts;  // [segments] picks so far; not read by the first panel
  const int32_t* picks;   // [all tokens] the picks of a segment, in order
  uint32_t* struck;       // [bit_words] candidates that picks of earlier panels strike

  __host__ __device__ int size() const { return 32 * words; }
  __device__ int candidates(int n) const { return min(max(n - first, 0), size()); }
  __device__ int count(int s) const { return first > 0 ? counts[s] : 0; }

  // Row of bits of a segment's first candidate.
  __device__ uint32_t* rows(const Segment& segment, int s) const {
    return bits + (all.cu_seqlens ? int64_t(segment.start) : int64_t(s) * min(all.tokens, size())) * words;
  }
  // Tokens of a segment's list, inside the segment whatever cu_seqlens holds.
  __device__ int token(const int32_t* list, const Segment& segment, int i) const {
    return min(max(list[int64_t(segment.start) + i], 0), segment.n - 1);
  }
};

// Two lists of kTile rows, without products.
template <class T, int kTile>
class RowLists {
 public:
  static constexpr int kBlocks = 4;

  static size_t shared_bytes() {
    Arena arena;
    RowLists lists(arena);
    return arena.used();
  }
  __host__ __device__ explicit RowLists(Arena& arena)
      : rows_(arena.take<const T*>(2 * kTile)),
        inverse_(arena.take<float>(2 * kTile)),
        scratch_(arena.take<int>(6 * kTile)) {}

  __device__ int* scratch() const { return scratch_; }
  __device__ void set(int slot, const T* row, float inverse) const {
    rows_[slot] = inverse > 0.0f ? row : nullptr;
    inverse_[slot] = row ? inverse : 0.0f;
  }
  // By a whole warp: the cosine of a row with the lane's column, where `wanted`.
  __device__ float cosine(int row, int column, bool wanted, int d, bool aligned) const {
    float found = 0.0f;
    uint32_t left = __ballot_sync(kAllLanes, wanted && rows_[row] && rows_[column]);
    for (; left; left &= left - 1) {
      const int lane = __ffs(int(left)) - 1, other = column - lane_index() + lane;
      const float dot = warp_dot(rows_[row], rows_[other], d, aligned);
      if (lane_index() == lane) found = __fmul_rn(__fmul_rn(dot, inverse_[row]), inverse_[other]);
    }
    return found;
  }

 private:
  const T** rows_;
  float* inverse_;
  int* scratch_;
};

template <class T, int kTile, bool kFew>
using EdgeTile = std::conditional_t<kFew, RowLists<T, kTile>, CosineTile<T, kTile>>;

// What edges are told by.
struct Graph {
  Rows rows;
  const float* inverse;  // [all tokens] inverse norms
  bool aligned;          // see aligned_rows
  EdgeRule rule;
  Pivots pivots;
};

// One tile of a panel. kStrike: rows are picks, in row_tiles tiles at most, else candidates. By a whole block; the
// tile's memory is in use until a barrier after it.
template <class T, int kTile, bool kFew, bool kStrike>
__device__ __forceinline__ void edge_tile(const EdgeTile<T, kTile, kFew>& tile, const Panel& panel, const Graph& graph,
                                          const Unit& unit, int row_tiles) {
  const EdgeRule& rule = graph.rule;
  const Segment segment(panel.all, unit.segment);
  const int count = panel.count(unit.segment);
  if (count >= segment.k) return;  // nothing is left to pick
  int row0, column0, row_count;
  const int column_count = panel.candidates(segment.n);
  const int32_t* row_list = panel.order + panel.first;
  if constexpr (kStrike) {
    const int idle = graph.pivots.suppress ? 0 : min(graph.pivots.of(unit.segment), count);
    row_list = panel.picks + idle;
    row_count = count - idle;
    row0 = unit.index % row_tiles * kTile;
    column0 = unit.index / row_tiles * kTile;
    if (row0 >= row_count) return;
  } else {
    const TriangleTile place(unit.index);
    row_count = column_count;
    row0 = place.row * kTile;
    column0 = place.column * kTile;
  }

  {
    const int slot = int(threadIdx.x);  // there are as many threads
    const bool is_row = slot < kTile;
    const int i = is_row ? row0 + slot : column0 + slot - kTile;
    const T* row = nullptr;
    float own = 0.0f;
    Place place{};
    if (i < (is_row ? row_count : column_count)) {
      const int token = panel.token(is_row ? row_list : panel.order + panel.first, segment, i);
      row = graph.rows.segment<T>(segment, unit.segment) + token * graph.rows.row_stride;
      own = graph.inverse[segment.start + token];
      if (rule.spatial) place = rule.place(segment.start + token);
    }
    tile.set(slot, row, own);
    if (rule.spatial) {
      tile.scratch()[3 * slot] = place.t;
      tile.scratch()[3 * slot + 1] = place.y;
      tile.scratch()[3 * slot + 2] = place.x;
    }
  }
  __syncthreads();

  // A warp has 32 columns, a lane one of them, and every other row.
  const int column = warp_index() % (kTile / 32) * 32 + lane_index();
  const auto place = [&](int slot) {
    const int* const p = tile.scratch() + 3 * slot;
    return rule.spatial ? Place{p[0], p[1], p[2]} : Place{};
  };
  const auto inside = [&](int row) {
    return row0 + row < row_count && column0 + column < column_count && (kStrike || row0 + row < column0 + column);
  };
  const double diagonal = rule.proximity == Proximity::kLinear && rule.spatial ? rule.diagonals[unit.segment] : 0.0;
  Place own = place(kTile + column);
  bool products = true;
  if (!kFew && rule.spatial) {
    bool any = false;
    for (int row = warp_index() / (kTile / 32); row < kTile && !any; row += 2) {
      any = inside(row) && rule.possible(place(row), own, diagonal);
    }
    products = __syncthreads_or(any);
  }
  if constexpr (!kFew) {
    if (products) {
      const int slot = int(threadIdx.x);
      const Place kept = place(slot);  // the products need its memory
      tile.compute(graph.rows.d, graph.aligned, !kStrike && row0 == column0);
      if (rule.spatial) {
        tile.scratch()[3 * slot] = kept.t;
        tile.scratch()[3 * slot + 1] = kept.y;
        tile.scratch()[3 * slot + 2] = kept.x;
        __syncthreads();
        own = place(kTile + column);
      }
    }
  }
  if (kStrike && !products) return;

  const int word = column0 / 32 + column / 32;
  uint32_t* const to = panel.rows(segment, unit.segment) + word;
  bool hit = false;
  for (int row = warp_index() / (kTile / 32); row < kTile && row0 + row < row_count; row += 2) {
    bool edge = false;
    if (products) {
      const Place other = place(row);
      if constexpr (kFew) {
        const bool near = inside(row) && rule.possible(other, own, diagonal);
        const float cosine = tile.cosine(row, kTile + column, near, graph.rows.d, graph.aligned);
        edge = near && rule.edge(cosine, other, own, diagonal);
      } else {
        edge = inside(row) && rule.edge(tile.at(row, column), other, own, diagonal);
      }
    }
    if constexpr (kStrike) {
      hit |= edge;
    } else {
      const uint32_t edges = __ballot_sync(kAllLanes, edge);
      if (lane_index() == 0) to[int64_t(row0 + row) * panel.words] = edges;
    }
  }
  if constexpr (kStrike) {
    const uint32_t hits = __ballot_sync(kAllLanes, hit);
    if (lane_index() == 0 && hits) {
      atomicOr(panel.struck + first_word(segment.start, unit.segment) + panel.first / 32 + word, hits);
    }
  }
}

// The bits of a panel, or with kStrike what earlier picks strike of it. By all blocks of a launch, which share out the
// tiles.
template <class T, int kTile, bool kFew, bool kStrike>
__device__ __forceinline__ void edge_tiles(const Panel& panel, const Graph& graph) {
  Arena arena(shared_memory());
  const EdgeTile<T, kTile, kFew> tile(arena);
  const int row_tiles = kStrike ? ceil_div(min(panel.all.k, panel.first), kTile) : 0;
  for (int item = int(blockIdx.x);; item += int(gridDim.x)) {
    const Unit unit = locate(panel.all, item, [&](int n) {
      const int columns = ceil_div(panel.candidates(n), kTile);
      return kStrike ? row_tiles * columns : triangle(columns);
    });
    if (unit.segment < 0) return;
    edge_tile<T, kTile, kFew, kStrike>(tile, panel, graph, unit, row_tiles);
    __syncthreads();
  }
}

template <class T, int kTile, bool kFew>
__global__ void __launch_bounds__(2 * kTile, EdgeTile<T, kTile, kFew>::kBlocks) edges_kernel(Panel panel, Graph graph) {
  edge_tiles<T, kTile, kFew, false>(panel, graph);
}

}  // namespace flashprune::gpu
