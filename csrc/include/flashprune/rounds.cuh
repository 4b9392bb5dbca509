// What MMR, max-min and DPP share on a GPU: the lazy blocked greedy of greedy.h by teams of blocks.
//
// Block r of a team of W owns the tokens i = r (mod W) of its segment. A round begins with
//   publish   each block publishes its best tokens by what they have absorbed so far, and a bound on its others
//   collect   the best kBlock of all published are the round's tokens, to every block alike
// A score never rises, so a stale score is an upper bound. What follows brings the round's tokens up to date and picks
// among them while the best beats the bound: the picks are those of the plain loop, for any sizes of team and block.
#pragma once

#include "flashprune/products.cuh"
#include "flashprune/similarity.cuh"
#include "flashprune/team.cuh"

namespace flashprune::gpu {

inline constexpr int kRoundThreads = 256;
inline constexpr int kPublished = 256;  // of a team, each round
inline constexpr int kBlock = 128;      // of those, the round's tokens: four a lane of a warp
inline constexpr int kTileRows = 32;    // of a tile of cosines: the round's 128 x 128 are 16 of them
inline constexpr int kTileCols = 32;
inline constexpr int kMostBlocks = 32;  // of a team: each publishes 8, so that few of the best are held back
inline constexpr int kPicked = -1;      // in place of the number of picks that a token has absorbed

// What the blocks of a team tell one another. Two of each, used in turn: a slow block may still read the last round's.
struct alignas(16) Exchange {
  Key keys[2][kPublished];
  Key bounds[2][kMostBlocks];
  uint32_t values[2][kPublished];  // the bits of a token's float
  int32_t seen[2][kPublished];
  alignas(16) float cosines[kBlock][kBlock];  // [pick, token] of the round
  int32_t count;                              // of picks, where one block makes them for the team
};

struct RoundsProblem {
  Rows rows;
  Segments segments;
  const float* norms;  // inverse norms of all tokens; 0 for rows without a direction
  int block;           // tokens a round, at most kBlock
  bool sort;
  int64_t* out;
  // workspace
  int32_t* offsets;  // [segments + 1] of packed segments, ascending
  int team;
  uint32_t* counters;  // [teams], zero
  Exchange* exchange;  // [teams]
  int32_t* seen;       // [tokens] picks absorbed; kPicked
  int32_t* picks;      // [total_k]
};

// A block's shared memory. The sums of a tile and the round's cosines are never needed at once.
struct RoundsShared {
  Key* nominated;  // [2 * threads]
  Key* published;  // [kPublished]
  Key* scratch;    // [kMostWarps]
  Key* over;       // [1] best published key that is not of the round
  int32_t* token;  // [kBlock], best first
  int32_t* slot;   // [kBlock] where it was published
  int32_t* seen;   // [kBlock]
  int32_t* order;  // [kBlock] of the round's, those that have seen least first
  float* value;    // [kBlock]
  int32_t* state;  // [4] size of the round; what its picks leave behind
  const void** rows;
  const void** columns;
  float* row_norms;
  float* column_norms;
  float* sums;

  __host__ __device__ RoundsShared(Arena& arena, int threads) {
    nominated = arena.take<Key>(size_t(2 * threads));
    published = arena.take<Key>(kPublished);
    scratch = arena.take<Key>(kMostWarps);
    over = arena.take<Key>(1);
    token = arena.take<int32_t>(kBlock);
    slot = arena.take<int32_t>(kBlock);
    seen = arena.take<int32_t>(kBlock);
    order = arena.take<int32_t>(kBlock);
    value = arena.take<float>(kBlock);
    state = arena.take<int32_t>(4);
    rows = arena.take<const void*>(kTileRows);
    columns = arena.take<const void*>(kTileCols);
    row_norms = arena.take<float>(kTileRows);
    column_norms = arena.take<float>(kTileCols);
    const size_t tile = Products<kTileRows, kTileCols>::bytes(threads / 32), round = kBlock * kBlock * sizeof(float);
    sums = arena.take<float>((tile > round ? tile : round) / sizeof(float));
  }
};

template <class T, bool kVector>
class Rounds {
 public:
  __device__ Rounds(const RoundsProblem& problem, const RoundsShared& shared, Team& team, int s)
      : problem_(problem),
        shared_(shared),
        team_(team),
        s_(s),
        at_(problem.segments, s),
        x_(problem.rows.segment<T>(at_, s)),
        exchange_(problem.exchange[team.index]),
        each_(kPublished / team.size) {}

 protected:
  __device__ int own(unsigned j) const { return team_.rank + int(j) * team_.size; }
  __device__ int next(int i) const { return i + int(blockDim.x) * team_.size; }
  __device__ int32_t& seen(int i) const { return problem_.seen[at_.start + i]; }
  __device__ int32_t& pick(int t) const { return problem_.picks[at_.first + t]; }
  __device__ float norm(int i) const { return problem_.norms[at_.start + i]; }
  __device__ bool mine(int i) const { return i % team_.size == team_.rank; }

  // Publishes the best of the block's own tokens by key_of, each with value_of, and a bound on the others.
  template <class KeyOf, class ValueOf>
  __device__ void publish(const KeyOf& key_of, const ValueOf& value_of) {
    // A thread keeps the best two of its tokens: of what it drops the bound knows.
    Key best = kNoKey, second = kNoKey, third = kNoKey;
    for (int i = own(threadIdx.x); i < at_.n; i = next(i)) {
      if (seen(i) == kPicked) continue;
      const Key key = key_of(i), below = min(best, key);
      best = max(best, key);
      third = max(third, min(second, below));
      second = max(second, below);
    }
    const int threads = int(blockDim.x);
    shared_.nominated[threadIdx.x] = best;
    shared_.nominated[threads + int(threadIdx.x)] = second;
    block_sort_descending(shared_.nominated, 2 * threads);
    third = block_max(third, shared_.scratch);
    parity_ ^= 1;
    for (int q = int(threadIdx.x); q < each_; q += threads) {
      const Key key = q < 2 * threads ? shared_.nominated[q] : kNoKey;
      const int to = team_.rank * each_ + q;
      exchange_.keys[parity_][to] = key;
      if (key == kNoKey) continue;
      exchange_.values[parity_][to] = value_of(key_index(key));
      exchange_.seen[parity_][to] = seen(key_index(key));
    }
    if (threadIdx.x == 0) {
      exchange_.bounds[parity_][team_.rank] = each_ < 2 * threads ? max(third, shared_.nominated[each_]) : third;
    }
  }

  // The round's tokens, best first, and the bound: the best key that any other token may have.
  __device__ void collect() {
    const int total = each_ * team_.size;
    Key bound = kNoKey;
    for (int r = int(threadIdx.x); r < team_.size; r += int(blockDim.x))
      bound = max(bound, exchange_.bounds[parity_][r]);
    for (int q = int(threadIdx.x); q < total; q += int(blockDim.x)) shared_.published[q] = exchange_.keys[parity_][q];
    if (threadIdx.x == 0) {
      shared_.over[0] = kNoKey;
      shared_.state[0] = 0;
    }
    bound = block_max(bound, shared_.scratch);
    for (int q = int(threadIdx.x); q < total; q += int(blockDim.x)) {
      const Key key = shared_.published[q];
      if (key == kNoKey) continue;
      int rank = 0;
      for (int u = 0; u < total; ++u) rank += shared_.published[u] > key;
      if (rank < problem_.block) {
        shared_.token[rank] = key_index(key);
        shared_.slot[rank] = q;
        shared_.seen[rank] = exchange_.seen[parity_][q];
        atomicAdd(&shared_.state[0], 1);
      } else if (rank == problem_.block) {
        shared_.over[0] = key;
      }
    }
    __syncthreads();
    size_ = shared_.state[0];
    bound_ = max(bound, shared_.over[0]);
  }

  // The best by key_of, compared with nothing, until there are `most` picks or no token has a key.
  template <class KeyOf>
  __device__ void take_best(int most, const KeyOf& key_of) {
    while (count_ < most) {
      publish(key_of, [](int) { return 0u; });
      team_.sync();
      collect();
      if (size_ == 0) return;
      int taken = 0;
      while (taken < size_ && count_ + taken < most && shared_.published[shared_.slot[taken]] > bound_) ++taken;
      for (int q = int(threadIdx.x); q < taken; q += int(blockDim.x)) {
        const int i = shared_.token[q];
        if (mine(i)) seen(i) = kPicked;
        if (team_.rank == 0) record(count_ + q, i);
      }
      count_ += taken;
      __syncthreads();
    }
  }

  __device__ void record(int t, int i) const {
    pick(t) = i;
    if (!problem_.sort) problem_.out[at_.first + t] = i + at_.base;
  }

  // The products of kTileRows tokens and kCols columns; -1: none.
  template <int kCols, class Token, class Column>
  __device__ Products<kTileRows, kCols> load_tile(const Token& token, const Column& column) const {
    const auto** rows = reinterpret_cast<const T**>(shared_.rows);
    const auto** columns = reinterpret_cast<const T**>(shared_.columns);
    for (int e = int(threadIdx.x); e < kTileRows + kCols; e += int(blockDim.x)) {
      const int c = e - kTileRows, i = e < kTileRows ? token(e) : column(c);
      const float own_norm = i < 0 ? 0.0f : norm(i);
      const T* const row = own_norm > 0.0f ? x_ + i * problem_.rows.row_stride : nullptr;
      (e < kTileRows ? rows[e] : columns[c]) = row;
      (e < kTileRows ? shared_.row_norms[e] : shared_.column_norms[c]) = own_norm;
    }
    __syncthreads();
    const Products<kTileRows, kCols> products{shared_.sums};
    products.template compute<T, kVector>(rows, columns, problem_.rows.d);
    return products;
  }

  template <class Tile>
  __device__ float cosine(const Tile& tile, int row, int column) const {
    return __fmul_rn(__fmul_rn(tile(row, column), shared_.row_norms[row]), shared_.column_norms[column]);
  }

  // use(row, largest cosine of its first columns), once a row.
  template <class Tile, class Use>
  __device__ void row_maxima(const Tile& tile, int columns, const Use& use) const {
    const int part = lane_index() % 8;
    for (int row = int(threadIdx.x) / 8; row < kTileRows; row += int(blockDim.x) / 8) {
      float largest = -INFINITY;
      for (int c = part; c < columns; c += 8) largest = max(largest, cosine(tile, row, c));
      for (int step = 4; step > 0; step /= 2) largest = max(largest, __shfl_xor_sync(kAllLanes, largest, step));
      if (part == 0) use(row, largest);
    }
    __syncthreads();
  }

  // The places of the round's tokens in the order of what they have seen: those that miss the same picks side by side
  // share a tile without waste.
  __device__ void order_by_seen() {
    for (int q = int(threadIdx.x); q < size_; q += int(blockDim.x)) {
      int before = 0;
      for (int u = 0; u < size_; ++u) {
        before += shared_.seen[u] < shared_.seen[q] || (shared_.seen[u] == shared_.seen[q] && u < q);
      }
      shared_.order[before] = q;
    }
    __syncthreads();
  }

  // This block's share of the cosines among the round's tokens; the team's tiles so far were `task`.
  __device__ void share_cosines(int task) {
    for (int g = 0; g < size_ && size_ > 1; g += kTileRows) {
      for (int h = 0; h < size_; h += kTileCols) {
        if (task++ % team_.size != team_.rank) continue;
        const auto tile = load_tile<kTileCols>([&](int row) { return g + row < size_ ? shared_.token[g + row] : -1; },
                                               [&](int c) { return h + c < size_ ? shared_.token[h + c] : -1; });
        for (int e = int(threadIdx.x); e < kTileRows * kTileCols; e += int(blockDim.x)) {
          const int row = e % kTileRows, c = e / kTileRows;
          exchange_.cosines[h + c][g + row] = cosine(tile, row, c);
        }
        __syncthreads();
      }
    }
  }

  // Ascending indices where they are wanted, and 0 where wrong cu_seqlens left no token to pick. After its barrier the
  // team is done with the exchange, which the next segment may then use.
  __device__ void finish() {
    team_.sync();
    if (team_.rank != 0) return;
    int64_t* const out = problem_.out + at_.first;
    int placed = count_;
    if (problem_.sort) {
      constexpr int kEach = 8;  // tokens a thread
      int* const scratch = reinterpret_cast<int*>(shared_.scratch);
      placed = 0;
      for (int from = 0; from < at_.n; from += int(blockDim.x) * kEach) {
        const int begin = from + int(threadIdx.x) * kEach, end = min(begin + kEach, at_.n);
        int chosen = 0, total;
        for (int i = begin; i < end; ++i) chosen += seen(i) == kPicked;
        int to = placed + block_exclusive_sum(chosen, total, scratch);
        for (int i = begin; i < end; ++i) {
          if (seen(i) == kPicked && to < at_.room) out[to++] = i + at_.base;
        }
        placed += total;
      }
    }
    for (int t = placed + int(threadIdx.x); t < at_.room; t += int(blockDim.x)) out[t] = 0;
  }

  const RoundsProblem& problem_;
  const RoundsShared& shared_;
  Team& team_;
  const int s_;
  const Segment at_;
  const T* const x_;
  Exchange& exchange_;
  const int each_;  // tokens that a block publishes
  int parity_ = 0;  // of the exchange
  int count_ = 0;   // of picks
  int size_ = 0;    // of the round
  Key bound_ = kNoKey;
};

// Sizes that the workspace and the launch follow from: host integers and the device alone.
struct RoundsPlan {
  int threads;
  size_t shared_bytes;
  Teams teams;

  template <class Stream, class Problem>
  RoundsPlan(Stream& stream, void (*kernel)(Problem), const Segments& segments, int threads)
      : threads(threads),
        shared_bytes(shared_for(threads)),
        teams(stream.resident_blocks(kernel, threads, shared_bytes), segments.count, kMostBlocks) {}

  // Deals the workspace out to a problem.
  void take(Arena& arena, RoundsProblem& problem) const {
    problem.offsets = arena.take<int32_t>(offset_count(problem.segments));
    problem.team = teams.size;
    problem.counters = arena.take<uint32_t>(size_t(teams.count));
    problem.exchange = arena.take<Exchange>(size_t(teams.count));
    problem.seen = arena.take<int32_t>(all_tokens(problem.segments));
    problem.picks = arena.take<int32_t>(size_t(problem.segments.total_k));
  }

  template <class Stream, class Problem>
  void launch(Stream& stream, void (*kernel)(Problem), const Problem& problem) const {
    stream.zero(problem.counters, size_t(teams.count) * sizeof(uint32_t));
    stream.launch(kernel, Shape{{unsigned(teams.blocks())}, threads, shared_bytes, true}, problem);
  }

 private:
  static size_t shared_for(int threads) {
    Arena shared;
    const RoundsShared sizes(shared, threads);
    return shared.used();
  }
};

// The op's `block` argument, 0 or more, as a size of rounds.
inline int round_size(int block) { return block == 0 || block > kBlock ? kBlock : block; }

}  // namespace flashprune::gpu
