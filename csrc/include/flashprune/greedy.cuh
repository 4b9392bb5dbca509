// MMR and max-min on a GPU: one cooperative launch makes all picks. After publish and collect (rounds.cuh) a round has
//   refresh   the team shares out the round's cosines: to the picks that its tokens have not absorbed, and among them
//   resolve   every block makes the same picks from these numbers, in one warp, while the best beats the bound
// hence two barriers a round. Cosines are computed tile by tile when they are needed, or read from a stored matrix.
// Then every token absorbs the picks at the end of their round: the bounds are tight and the rounds few. (Counted on a
// photograph's 2,880 tokens, K = 720: 11 rounds instead of 50.)
//
// A computed cosine is always that of a token (row) with a pick (column), so that a pair has one value wherever it is
// needed. Memory: 8 bytes a token and 73 KB a team, and the matrix where there is one.
#pragma once

#include "flashprune/rounds.cuh"

namespace flashprune::gpu {

// Where the cosines of a call come from.
enum class Cosines { kAutomatic, kComputed, kStored };

inline size_t pairs(const Segments& segments) { return all_tokens(segments) * size_t(segments.tokens); }

inline constexpr size_t kMostPairs = 16 << 20;  // of a stored matrix: 64 MB

inline bool stored(Cosines cosines, const Segments& segments) {
  return cosines == Cosines::kAutomatic ? pairs(segments) <= kMostPairs : cosines == Cosines::kStored;
}

struct GreedyProblem : RoundsProblem {
  Scores importance;          // no data: 1 for each
  const uint32_t* isolation;  // null: the first picks go by importance; else by 1 - from_ordered_bits
  const float* matrix;        // cosines [items, tokens, tokens] as similarity.cuh stores them; null: computed here
  float lam, rest;
  int per_round;
  float* nearest;  // workspace [tokens]: largest cosine to a pick absorbed
};

template <class T, bool kVector>
class Greedy : public Rounds<T, kVector> {
 public:
  __device__ Greedy(const GreedyProblem& problem, const RoundsShared& shared, Team& team, int s)
      : Rounds<T, kVector>(problem, shared, team, s), p_(problem) {}

  __device__ void run() {
    for (int i = own(threadIdx.x); i < at_.n; i = next(i)) {
      seen(i) = 0;
      nearest(i) = -INFINITY;
    }
    const int first = min(at_.k, p_.per_round);
    take_best(first, [&](int i) { return first_key(i); });
    committed_ = count_;
    if (count_ < at_.k) {
      team_.sync();  // the first picks are in p_.picks
      absorb_first();
    }
    // It ends: the bound is the key of no token of the round, so the best of the round is picked, unless it missed
    // picks, which it has then absorbed.
    while (count_ < at_.k && round()) {
    }
    finish();
  }

 private:
  __device__ float& nearest(int i) const { return p_.nearest[at_.start + i]; }
  __device__ float importance(int i) const { return p_.importance.data ? p_.importance.at(at_, s_, i) : 1.0f; }
  __device__ float weight(int i) const { return __fmul_rn(p_.lam, importance(i)); }
  __device__ Key key(float weight, float nearest, int i) const {
    return make_key(__fsub_rn(weight, __fmul_rn(p_.rest, nearest)), i);
  }
  __device__ Key first_key(int i) const {
    if (!p_.isolation) return make_key(importance(i), i);
    return make_key(__fsub_rn(1.0f, from_ordered_bits(p_.isolation[at_.start + i])), i);
  }
  // Of a token with a pick, where the matrix is stored: it is symmetric, so adjacent tokens may be read together.
  __device__ float stored(int token, int pick) const {
    return p_.matrix[int64_t(at_.start + pick) * p_.segments.tokens + token];
  }

  // Every token absorbs the first picks.
  __device__ void absorb_first() {
    if (p_.matrix) {
      for (int i = own(threadIdx.x); i < at_.n; i = next(i)) {
        if (seen(i) == kPicked) continue;
        for (int t = 0; t < committed_; ++t) nearest(i) = max(nearest(i), stored(i, pick(t)));
        seen(i) = committed_;
      }
      return;
    }
    const int own_count = (at_.n - team_.rank + team_.size - 1) / team_.size;
    for (int j = 0; j < own_count; j += kTileRows) {
      for (int t = 0; t < committed_; t += kTileCols) {
        const auto token = [&](int row) { return j + row < own_count ? own(unsigned(j + row)) : -1; };
        const auto column = [&](int c) { return t + c < committed_ ? pick(t + c) : -1; };
        // For the usual one pick the tile of eight columns, which gives the same values.
        const auto absorb = [&](int row, float cosine) {
          const int i = token(row);
          if (i >= 0) nearest(i) = max(nearest(i), cosine);
        };
        if (committed_ - t <= 8) {
          this->row_maxima(this->template load_tile<8>(token, column), min(committed_ - t, 8), absorb);
        } else {
          this->row_maxima(this->template load_tile<kTileCols>(token, column), min(committed_ - t, kTileCols), absorb);
        }
      }
    }
    for (int i = own(threadIdx.x); i < at_.n; i = next(i)) {
      if (seen(i) != kPicked) seen(i) = committed_;
    }
  }

  // False: no token is left.
  __device__ bool round() {
    publish([&](int i) { return key(weight(i), nearest(i), i); }, [&](int i) { return ordered_bits(nearest(i)); });
    team_.sync();
    collect();
    if (size_ == 0) return false;
    refresh();
    team_.sync();
    resolve();
    return true;
  }

  // This block's share of the round's cosines.
  __device__ void refresh() {
    if (p_.matrix) {
      read_cosines();
      return;
    }
    order_by_seen();
    int task = 0;
    for (int g = 0; g < size_; g += kTileRows) {
      const auto place = [&](int row) { return g + row < size_ ? shared_.order[g + row] : -1; };
      const auto token = [&](int row) { return g + row < size_ ? shared_.token[shared_.order[g + row]] : -1; };
      for (int t = shared_.seen[shared_.order[g]]; t < committed_; t += kTileCols) {
        if (task++ % team_.size != team_.rank) continue;
        const auto column = [&](int c) { return t + c < committed_ ? pick(t + c) : -1; };
        const auto tile = this->template load_tile<kTileCols>(token, column);
        this->row_maxima(tile, min(committed_ - t, kTileCols), [&](int row, float cosine) {
          if (place(row) >= 0) atomicMax(value_of(place(row)), ordered_bits(cosine));
        });
      }
    }
    share_cosines(task);
  }

  // From the stored matrix those among the round's tokens are all that is asked for: a warp for each, as a pick.
  __device__ void read_cosines() {
    const int warps = int(blockDim.x / 32);
    for (int q = team_.rank * warps + warp_index(); q < size_; q += team_.size * warps) {
      for (int u = lane_index(); u < size_; u += 32) {
        exchange_.cosines[q][u] = stored(shared_.token[u], shared_.token[q]);
      }
    }
  }

  __device__ uint32_t* value_of(int q) const { return &exchange_.values[parity_][shared_.slot[q]]; }

  // Picks among the round's tokens while the best of them beats everything outside.
  __device__ void resolve() {
    float* const cosines = shared_.sums;
    for (int e = 4 * int(threadIdx.x); size_ > 1 && e < size_ * kBlock; e += 4 * int(blockDim.x)) {
      copy_async_16(cosines + e, &exchange_.cosines[0][0] + e);
    }
    copy_async_commit();
    for (int q = int(threadIdx.x); q < size_; q += int(blockDim.x)) {
      shared_.value[q] = from_ordered_bits(*value_of(q));
    }
    copy_async_wait<0>();
    __syncthreads();
    const int first_pick = count_, absorbed = committed_;
    if (warp_index() == 0) make_picks(cosines);
    __syncthreads();
    count_ = shared_.state[1];
    committed_ = shared_.state[2];
    for (int q = int(threadIdx.x); q < size_; q += int(blockDim.x)) {
      const int i = shared_.token[q];
      if (!mine(i)) continue;
      nearest(i) = shared_.value[q];
      seen(i) = shared_.seen[q];
    }
    __syncthreads();
    if (p_.matrix) absorb_round(absorbed, first_pick);
  }

  // The block's own tokens absorb picks `from` to committed_; the round's, from first_pick on, are in shared_.order.
  __device__ void absorb_round(int from, int first_pick) {
    for (int i = own(threadIdx.x); i < at_.n; i = next(i)) {
      if (seen(i) == kPicked) continue;
      float largest = nearest(i);
#pragma unroll 8  // loads in flight
      for (int t = from; t < committed_; ++t) {
        largest = max(largest, stored(i, t < first_pick ? pick(t) : shared_.order[t - first_pick]));
      }
      nearest(i) = largest;
      seen(i) = committed_;
    }
  }

  // One warp, the tokens lane, lane + 32, ... to each lane.
  __device__ void make_picks(const float* cosines) {
    constexpr int kEach = kBlock / 32;
    Key keys[kEach];
    float weights[kEach], nearest[kEach];
    float open[kEach];  // largest cosine to the picks of an incomplete group
#pragma unroll
    for (int m = 0; m < kEach; ++m) {
      const int q = lane_index() + 32 * m;
      keys[m] = kNoKey;
      weights[m] = 0.0f;
      nearest[m] = open[m] = -INFINITY;
      if (q < size_) {
        weights[m] = weight(shared_.token[q]);
        nearest[m] = shared_.value[q];
        keys[m] = key(weights[m], nearest[m], shared_.token[q]);
      }
    }
    const int first_pick = count_;
    int count = count_, committed = committed_, absorbed = committed_;
    uint32_t picked = 0;  // of this lane's
    for (;;) {
      Key best = keys[0];
#pragma unroll
      for (int m = 1; m < kEach; ++m) best = max(best, keys[m]);
      best = warp_max(best);
      if (best <= bound_ || count == at_.k) break;
      int own_place = -1;
#pragma unroll
      for (int m = 0; m < kEach; ++m) {
        if (keys[m] != best) continue;
        own_place = lane_index() + 32 * m;
        keys[m] = kNoKey;
        picked |= 1u << m;
      }
      const int place = __reduce_max_sync(kAllLanes, own_place);
      if (lane_index() == 0) {
        shared_.order[count - first_pick] = key_index(best);
        if (team_.rank == 0) record(count, key_index(best));
      }
      ++count;
      const bool complete = count - committed >= p_.per_round;
      // Picks of a group that began in an earlier round are not among the cosines: the next refresh has them.
      const bool carried = complete && committed < first_pick;
#pragma unroll
      for (int m = 0; m < kEach; ++m) {
        const int q = lane_index() + 32 * m;
        if (keys[m] == kNoKey) continue;
        open[m] = max(open[m], cosines[place * kBlock + q]);
        if (!complete || carried) continue;
        nearest[m] = max(nearest[m], open[m]);
        open[m] = -INFINITY;
        keys[m] = key(weights[m], nearest[m], shared_.token[q]);
      }
      if (complete) committed = count;
      if (carried) break;
      if (complete) absorbed = count;
    }
#pragma unroll
    for (int m = 0; m < kEach; ++m) {
      const int q = lane_index() + 32 * m;
      if (q >= size_) continue;
      shared_.value[q] = nearest[m];
      shared_.seen[q] = picked >> m & 1 ? kPicked : absorbed;
    }
    if (lane_index() == 0) {
      shared_.state[1] = count;
      shared_.state[2] = committed;
    }
  }

  using Base = Rounds<T, kVector>;
  using Base::at_, Base::bound_, Base::count_, Base::exchange_, Base::parity_, Base::s_, Base::shared_, Base::size_,
      Base::team_;
  using Base::collect, Base::finish, Base::mine, Base::next, Base::order_by_seen, Base::own, Base::pick, Base::publish,
      Base::record, Base::seen, Base::share_cosines, Base::take_best;

  const GreedyProblem& p_;
  int committed_ = 0;  // picks that tokens may absorb: the complete groups of per_round
};

template <class T, bool kVector>
__global__ void __launch_bounds__(kRoundThreads, 1) greedy_kernel(const __grid_constant__ GreedyProblem problem) {
  Arena arena(shared_memory());
  const RoundsShared shared(arena, int(blockDim.x));
  Team team(problem.counters, problem.team);
  for (int s = team.index; s < problem.segments.count; s += team.count) {
    Greedy<T, kVector>(problem, shared, team, s).run();
  }
}

// A call of MMR or max-min from its settings to the launch of the kernel.
template <class T>
class GreedyLaunch {
 public:
  template <class Stream>
  GreedyLaunch(Stream& stream, const Rows& rows, const Segments& segments, int threads, Arena& arena);
  template <class Stream>
  void run(Stream& stream) const;

  GreedyProblem problem{};

 private:
  void (*kernel_)(GreedyProblem);
  RoundsPlan plan_;
};

// Not in the class, where they would be inline and each operator would compile the kernels again.
template <class T>
template <class Stream>
GreedyLaunch<T>::GreedyLaunch(Stream& stream, const Rows& rows, const Segments& segments, int threads, Arena& arena)
    : kernel_(aligned_rows(rows, sizeof(T)) ? greedy_kernel<T, true> : greedy_kernel<T, false>),
      plan_(stream, kernel_, segments, threads) {
  problem.rows = rows;
  problem.segments = segments;
  plan_.take(arena, problem);
  problem.nearest = arena.take<float>(all_tokens(segments));
}

template <class T>
template <class Stream>
void GreedyLaunch<T>::run(Stream& stream) const {
  plan_.launch(stream, kernel_, problem);
}

}  // namespace flashprune::gpu
