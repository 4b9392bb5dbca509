// Greedy MAP of a determinantal point process (CDPruner, arXiv 2506.10967; Chen et al. 2018, arXiv 1709.05135): two
// launches, three for packed segments. Kernel L_ij = r_i cos(i, j) r_j; token i holds its row c_i of the incremental
// Cholesky factor up to the last pick it has absorbed, and its gain is what is left of L_ii. After publish and collect
// (rounds.cuh) a round has
//   refresh     the team shares out the round's cosines
//   substitute  a warp for each token: the entries of its row that it lacks, and its gain
//   resolve     one block picks among the tokens while the best beats the bound, each absorbing every pick
// and a fourth barrier makes the result known. When only spent tokens are left, relevance fills the rest.
//
// Every inner product of factor rows is summed in one order, so a token has one gain whichever way it absorbs a pick.
// Memory: K + 2 floats a token, of which only absorbed entries are touched, and K^2 a segment.
#pragma once

#include "flashprune/rounds.cuh"

namespace flashprune::gpu {

// A token with this share of its L_ii left is spent: the float32 noise floor.
inline constexpr float kRankTolerance = 1e-5f;

struct DppProblem : RoundsProblem {
  Scores relevance;
  // workspace
  float* gain;    // [tokens]
  float* factor;  // [tokens, k] rows c_i
  float* lower;   // [segments, k, k] those of the picks, in order
  float* roots;   // [total_k] square roots of the picks' gains
};

template <class T, bool kVector>
class Dpp : public Rounds<T, kVector> {
 public:
  __device__ Dpp(const DppProblem& problem, const RoundsShared& shared, Team& team, int s)
      : Rounds<T, kVector>(problem, shared, team, s),
        p_(problem),
        lower_(problem.lower + int64_t(s) * problem.segments.k * problem.segments.k) {}

  __device__ void run() {
    for (int i = own(threadIdx.x); i < at_.n; i = next(i)) {
      seen(i) = 0;
      gain(i) = this->norm(i) > 0.0f ? __fmul_rn(relevance(i), relevance(i)) : 0.0f;
    }
    while (count_ < at_.k && round()) {  // it ends as greedy.cuh does
    }
    take_best(at_.k, [&](int i) { return make_key(relevance(i), i); });
    finish();
  }

 private:
  __device__ float relevance(int i) const { return p_.relevance.at(at_, s_, i); }
  __device__ float& gain(int i) const { return p_.gain[at_.start + i]; }
  __device__ float* factor(int i) const { return p_.factor + int64_t(at_.start + i) * p_.segments.k; }
  __device__ float* lower(int t) const { return lower_ + int64_t(t) * p_.segments.k; }
  __device__ float& root(int t) const { return p_.roots[at_.first + t]; }

  // kNoKey where the gain is spent, which NaN is.
  __device__ Key gain_key(float gain, int i) const {
    const float own = relevance(i);
    return gain > __fmul_rn(kRankTolerance, __fmul_rn(own, own)) ? make_key(gain, i) : kNoKey;
  }

  // Entry of token i for pick t, of token j, from their cosine and the inner product of their rows so far.
  __device__ float entry(int i, int j, int t, float cosine, float product) const {
    const float kernel = __fmul_rn(__fmul_rn(relevance(j), cosine), relevance(i));
    return __fdiv_rn(__fsub_rn(kernel, product), root(t));
  }
  __device__ static float less(float gain, float entry) { return __fsub_rn(gain, __fmul_rn(entry, entry)); }

  // The sum of the lanes' parts, each of the entries u = lane (mod 32) in ascending order.
  __device__ static float lanes_sum(float part) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) part = __fadd_rn(part, __shfl_xor_sync(kAllLanes, part, step));
    return part;
  }

  // False: no token has a gain.
  __device__ bool round() {
    publish([&](int i) { return gain_key(gain(i), i); }, [&](int i) { return std::bit_cast<uint32_t>(gain(i)); });
    team_.sync();
    collect();
    if (size_ == 0) return false;
    refresh();
    team_.sync();
    const int warps = int(blockDim.x / 32);
    for (int q = team_.rank * warps + warp_index(); q < size_; q += team_.size * warps) substitute(q);
    team_.sync();
    if (team_.rank == 0) resolve();
    team_.sync();
    count_ = exchange_.count;
    for (int q = int(threadIdx.x); q < size_; q += int(blockDim.x)) {
      const int i = shared_.token[q], slot = shared_.slot[q];
      if (!mine(i)) continue;
      gain(i) = std::bit_cast<float>(exchange_.values[parity_][slot]);
      seen(i) = exchange_.seen[parity_][slot];
    }
    __syncthreads();
    return true;
  }

  // This block's share of the round's cosines: those to picks go where the entries will be.
  __device__ void refresh() {
    order_by_seen();
    int task = 0;
    for (int g = 0; g < size_; g += kTileRows) {
      const auto place = [&](int row) { return g + row < size_ ? shared_.order[g + row] : -1; };
      for (int t = shared_.seen[shared_.order[g]]; t < count_; t += kTileCols) {
        if (task++ % team_.size != team_.rank) continue;
        const auto tile = this->template load_tile<kTileCols>(
            [&](int row) { return place(row) < 0 ? -1 : shared_.token[place(row)]; },
            [&](int c) { return t + c < count_ ? pick(t + c) : -1; });
        for (int e = int(threadIdx.x); e < kTileRows * kTileCols; e += int(blockDim.x)) {
          const int q = place(e / kTileCols), c = e % kTileCols;
          if (q < 0 || t + c >= count_ || t + c < shared_.seen[q]) continue;
          factor(shared_.token[q])[t + c] = this->cosine(tile, e / kTileCols, c);
        }
        __syncthreads();
      }
    }
    share_cosines(task);
  }

  // One warp: from cosines to entries, 32 picks at a time. A lane sums its part for each of the 32 over the entries
  // before them, which depend on none of them; what is left is a chain of 32 short steps.
  __device__ void substitute(int q) {
    const int i = shared_.token[q], slot = shared_.slot[q], lane = lane_index();
    float* const row = factor(i);
    float left = std::bit_cast<float>(exchange_.values[parity_][slot]);
    for (int from = shared_.seen[q] / 32 * 32; from < count_; from += 32) {
      float parts[32] = {};
      for (int u = lane; u < from; u += 32) {
        const float own = row[u];
#pragma unroll
        for (int j = 0; j < 32; ++j) {
          if (from + j < count_) parts[j] = __fmaf_rn(own, lower(from + j)[u], parts[j]);
        }
      }
      const bool inside = from + lane < count_;
      float value = inside ? row[from + lane] : 0.0f;  // an entry, or still a cosine
      const int own_pick = inside ? pick(from + lane) : 0;
#pragma unroll
      for (int j = 0; j < 32; ++j) {
        const int t = from + j;
        if (t >= count_ || t < shared_.seen[q]) continue;
        float part = parts[j];
        if (lane < j) part = __fmaf_rn(value, lower(t)[from + lane], part);
        const float product = lanes_sum(part), cosine = __shfl_sync(kAllLanes, value, j);
        const float found = entry(i, __shfl_sync(kAllLanes, own_pick, j), t, cosine, product);
        if (lane == j) value = found;
        left = less(left, found);
      }
      if (inside) row[from + lane] = value;  // which no other lane reads
    }
    if (lane == 0) exchange_.values[parity_][slot] = std::bit_cast<uint32_t>(left);
  }

  // By one block: picks among the round's tokens while the best of them beats everything outside.
  __device__ void resolve() {
    Key* const keys = shared_.published;  // read by then
    const int warps = int(blockDim.x / 32), lane = lane_index();
    for (int q = int(threadIdx.x); q < size_; q += int(blockDim.x)) {
      shared_.value[q] = std::bit_cast<float>(exchange_.values[parity_][shared_.slot[q]]);
      keys[q] = gain_key(shared_.value[q], shared_.token[q]);
      shared_.seen[q] = count_;
    }
    for (; count_ < at_.k; ++count_) {
      Key best = kNoKey;
      for (int q = int(threadIdx.x); q < size_; q += int(blockDim.x)) best = max(best, keys[q]);
      best = block_max(best, shared_.scratch);
      if (best <= bound_) break;
      const int j = key_index(best), t = count_;
      for (int q = int(threadIdx.x); q < size_; q += int(blockDim.x)) {
        if (keys[q] != best) continue;
        keys[q] = kNoKey;
        shared_.seen[q] = kPicked;
        shared_.state[1] = q;
        this->record(t, j);
        root(t) = __fsqrt_rn(key_score(best));
      }
      for (int u = int(threadIdx.x); u < t; u += int(blockDim.x)) lower(t)[u] = factor(j)[u];
      __syncthreads();
      const float* const cosines = exchange_.cosines[shared_.state[1]];
      for (int q = warp_index(); q < size_; q += warps) {
        if (keys[q] == kNoKey) continue;
        const int i = shared_.token[q];
        float part = 0.0f;
        for (int u = lane; u < t; u += 32) part = __fmaf_rn(factor(i)[u], lower(t)[u], part);
        const float product = lanes_sum(part);
        if (lane > 0) continue;
        const float found = entry(i, j, t, cosines[q], product);
        factor(i)[t] = found;
        shared_.value[q] = less(shared_.value[q], found);
        shared_.seen[q] = t + 1;
        keys[q] = gain_key(shared_.value[q], i);
      }
      __syncthreads();
    }
    for (int q = int(threadIdx.x); q < size_; q += int(blockDim.x)) {
      exchange_.values[parity_][shared_.slot[q]] = std::bit_cast<uint32_t>(shared_.value[q]);
      exchange_.seen[parity_][shared_.slot[q]] = shared_.seen[q];
    }
    if (threadIdx.x == 0) exchange_.count = count_;
  }

  using Base = Rounds<T, kVector>;
  using Base::at_, Base::bound_, Base::count_, Base::exchange_, Base::parity_, Base::s_, Base::shared_, Base::size_,
      Base::team_;
  using Base::collect, Base::finish, Base::mine, Base::next, Base::order_by_seen, Base::own, Base::pick, Base::publish,
      Base::seen, Base::share_cosines, Base::take_best;

  const DppProblem& p_;
  float* const lower_;
};

template <class T, bool kVector>
__global__ void __launch_bounds__(kRoundThreads, 1) dpp_kernel(const __grid_constant__ DppProblem problem) {
  Arena arena(shared_memory());
  const RoundsShared shared(arena, int(blockDim.x));
  Team team(problem.counters, problem.team);
  for (int s = team.index; s < problem.segments.count; s += team.count) {
    Dpp<T, kVector>(problem, shared, team, s).run();
  }
}

struct DppCall {
  Rows rows;
  Segments segments;
  Scores relevance;
  int block;  // tokens a round; 0: chosen here. Any value gives the same picks.
  bool sort;
  int64_t* out;
  int threads = kRoundThreads;
};

// Bytes of workspace, from host integers alone; with memory also the call itself.
template <class T, class Stream>
size_t dpp(Stream& stream, const DppCall& call, unsigned char* memory) {
  const auto kernel = aligned_rows(call.rows, sizeof(T)) ? dpp_kernel<T, true> : dpp_kernel<T, false>;
  const RoundsPlan plan(stream, kernel, call.segments, call.threads);
  const size_t tokens = all_tokens(call.segments), k = size_t(call.segments.k);
  Arena arena(memory);
  DppProblem problem{};
  problem.rows = call.rows;
  problem.segments = call.segments;
  plan.take(arena, problem);
  float* const norms = arena.take<float>(tokens);
  problem.gain = arena.take<float>(tokens);
  problem.factor = arena.take<float>(tokens * k);
  problem.lower = arena.take<float>(size_t(call.segments.count) * k * k);
  problem.roots = arena.take<float>(size_t(call.segments.total_k));
  if (!memory) return arena.used();
  problem.segments = ascending(stream, call.segments, problem.offsets);
  inverse_norms<T>(stream, problem.segments, call.rows, norms);
  problem.norms = norms;
  problem.relevance = call.relevance;
  problem.block = round_size(call.block);
  problem.sort = call.sort;
  problem.out = call.out;
  plan.launch(stream, kernel, problem);
  return arena.used();
}

}  // namespace flashprune::gpu
