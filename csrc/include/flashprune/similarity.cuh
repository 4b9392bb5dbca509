// The wide stages: inverse norms, each token's nearest other one, and the cosines of all pairs. Norms read every
// feature once. The other two multiply each pair of a segment once, N²·D flops, half of the square: of a pair the
// earlier token is the row. Maxima meet in memory as integers that compare as the floats do, so their order is
// irrelevant.
#pragma once

#include "flashprune/locate.cuh"
#include "flashprune/tile.cuh"

namespace flashprune::gpu {

inline constexpr int kNormThreads = 256;

// Whether every row begins at a multiple of 16 bytes and holds a whole number of them.
inline bool aligned_rows(const Rows& rows, size_t element) {
  const size_t strides = size_t(rows.row_stride) | size_t(rows.item_stride) | size_t(rows.d);
  return (reinterpret_cast<uintptr_t>(rows.data) | strides * element) % 16 == 0;
}

// Product of two rows by a warp, to all its lanes; the order of the sum depends on d alone.
template <class T>
__device__ __forceinline__ float warp_dot(const T* a, const T* b, int d, bool aligned) {
  constexpr int kElements = 16 / int(sizeof(T));
  struct alignas(16) Piece {
    T elements[kElements];
  };
  float sum = 0.0f;
  if (aligned) {
#pragma unroll 4
    for (int k = lane_index() * kElements; k < d; k += 32 * kElements) {
      const Piece left = *reinterpret_cast<const Piece*>(a + k), right = *reinterpret_cast<const Piece*>(b + k);
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        sum = __fmaf_rn(to_float(left.elements[e]), to_float(right.elements[e]), sum);
      }
    }
  } else {
    for (int k = lane_index() * kElements; k < d; k += 32 * kElements) {
      for (int e = k; e < min(k + kElements, d); ++e) sum = __fmaf_rn(to_float(a[e]), to_float(b[e]), sum);
    }
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum = __fadd_rn(sum, __shfl_xor_sync(kAllLanes, sum, step));
  return sum;
}

// 0 where the square is below the smallest normal float, or not finite.
__device__ __forceinline__ float inverse_norm(float square) {
  return square >= 1.17549435e-38f && square <= 3.40282347e38f ? __fdiv_rn(1.0f, __fsqrt_rn(square)) : 0.0f;
}

// Of row `token`, counted through all items.
template <class T>
__device__ __forceinline__ void write_inverse_norm(const Rows& rows, int tokens, int64_t token, bool aligned,
                                                   float* inverse) {
  const T* const row =
      static_cast<const T*>(rows.data) + token / tokens * rows.item_stride + token % tokens * rows.row_stride;
  const float square = warp_dot(row, row, rows.d, aligned);
  if (lane_index() == 0) inverse[token] = inverse_norm(square);
}

// tokens: of an item.
template <class T>
__global__ void __launch_bounds__(kNormThreads)
    inverse_norms_kernel(Rows rows, int tokens, int64_t all, bool aligned, float* inverse) {
  const int64_t token = int64_t(blockIdx.x) * (blockDim.x / 32) + warp_index();
  if (token < all) write_inverse_norm<T>(rows, tokens, token, aligned, inverse);
}

// inverse: [all_tokens].
template <class T, class Stream>
void inverse_norms(Stream& stream, const Segments& all, const Rows& rows, float* inverse) {
  const size_t tokens = all_tokens(all);
  if (tokens == 0) return;
  const unsigned blocks = unsigned((tokens + kNormThreads / 32 - 1) / (kNormThreads / 32));
  stream.launch(inverse_norms_kernel<T>, Shape{dim3{blocks, 1, 1}, kNormThreads}, rows, all.tokens, int64_t(tokens),
                aligned_rows(rows, sizeof(T)), inverse);
}

// Sets a tile's rows and columns to tokens of a segment from row0 and column0 on, in order of index.
template <class T, int kTile>
__device__ __forceinline__ void set_tile(const CosineTile<T, kTile>& tile, const Segment& segment, const T* first,
                                         int64_t stride, const float* inverse, int row0, int column0) {
  const int slot = int(threadIdx.x);  // there are as many threads
  const int token = (slot < kTile ? row0 : column0 - kTile) + slot;
  const bool inside = token < segment.n;
  tile.set(slot, inside ? first + token * stride : nullptr, inside ? inverse[segment.start + token] : 0.0f);
}

// ordered_bits of the largest cosine to another token; 0, which memory is zeroed to, where there is none.
__device__ __forceinline__ float from_ordered_bits(uint32_t bits) {
  return key_score(Key(bits < 0x007fffffu ? 0x007fffffu : bits) << 32);
}

// Either result may be null.
template <class T, int kTile>
__global__ void __launch_bounds__(2 * kTile, CosineTile<T, kTile>::kBlocks)
    all_pairs_kernel(Segments all, Rows rows, const float* inverse, bool aligned, uint32_t* nearest, float* out) {
  Arena arena(shared_memory());
  const CosineTile<T, kTile> tile(arena);
  const Unit unit = locate(all, int(blockIdx.x), [](int n) { return triangle(ceil_div(n, kTile)); });
  if (unit.segment < 0) return;
  const Segment segment(all, unit.segment);
  const TriangleTile place(unit.index);
  const int row0 = place.row * kTile, column0 = place.column * kTile;
  set_tile(tile, segment, rows.segment<T>(segment, unit.segment), rows.row_stride, inverse, row0, column0);
  tile.compute(rows.d, aligned, row0 == column0);

  if (nearest) {
    // A thread has a row or a column: the first kTile threads the rows.
    const int own = int(threadIdx.x) % kTile;
    const bool is_row = int(threadIdx.x) < kTile;
    const int token = (is_row ? row0 : column0) + own;
    const int others = token >= segment.n ? 0 : min(kTile, segment.n - (is_row ? column0 : row0));
    uint32_t best = 0;
    for (int other = 0; other < others; ++other) {
      const int r = is_row ? own : other, c = is_row ? other : own;
      if (row0 + r < column0 + c) best = max(best, ordered_bits(tile.at(r, c)));
    }
    if (best) atomicMax(nearest + segment.start + token, best);
  }
  if (!out) return;
  float* const matrix = out + int64_t(segment.start) * all.tokens;
  for (int i = int(threadIdx.x); i < kTile * kTile; i += 2 * kTile) {
    const int slow = i / kTile, fast = i % kTile;
    // [row, column], then [column, row]: adjacent threads write adjacent places both times
    const int row = row0 + slow, column = column0 + fast;
    if (row <= column && column < segment.n) matrix[int64_t(row) * all.tokens + column] = tile.at(slow, fast);
    const int later = column0 + slow, earlier = row0 + fast;
    if (earlier < later && later < segment.n) matrix[int64_t(later) * all.tokens + earlier] = tile.at(fast, slow);
  }
}

// Small tiles where large ones would leave multiprocessors idle.
template <class Stream>
int choose_tile(Stream& stream, const Segments& all, int most) {
  const int side = all.tokens < most ? all.tokens : most;
  const int64_t tiles = int64_t(all.cu_seqlens ? 1 : all.count) * triangle(ceil_div(side, kLargeTile));
  return tiles >= stream.multiprocessors() ? kLargeTile : kSmallTile;
}

// What all pairs of a segment tell, from one product of each; either result may be null.
//   nearest: [all_tokens] each token's largest cosine to another one, read with from_ordered_bits
//   out: cosines [items, tokens, tokens], symmetric to the bit; of packed segments [all tokens, tokens], a row's
//   entries
//        counted from its segment's first token
// tile: 0 lets it choose; it changes no value.
template <class T, class Stream>
void all_pairs(Stream& stream, const Segments& all, const Rows& rows, const float* inverse, uint32_t* nearest,
               float* out, int tile = 0) {
  const size_t tokens = all_tokens(all);
  if (tokens == 0) return;
  if (nearest) stream.zero(nearest, tokens * sizeof(uint32_t));
  if (tile == 0) tile = choose_tile(stream, all, all.tokens);
  const bool large = tile == kLargeTile;
  const Shape shape{dim3{unsigned(most_triangles(all, tile, all.tokens)), 1, 1}, 2 * tile,
                    large ? CosineTile<T, kLargeTile>::shared_bytes() : CosineTile<T, kSmallTile>::shared_bytes()};
  stream.launch(large ? all_pairs_kernel<T, kLargeTile> : all_pairs_kernel<T, kSmallTile>, shape, all, rows, inverse,
                aligned_rows(rows, sizeof(T)), nearest, out);
}

}  // namespace flashprune::gpu
