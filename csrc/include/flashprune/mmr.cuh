// Maximal Marginal Relevance (IDPruner, arXiv 2602.13315, Algorithm 1): two launches, or three with stored cosines;
// one more for packed segments.
#pragma once

#include "flashprune/greedy.cuh"

namespace flashprune::gpu {

struct MmrCall {
  Rows rows;
  Segments segments;
  Scores importance;
  double lam;
  int per_round;
  int block;  // tokens a round; 0: chosen here. Any value gives the same picks.
  bool sort;
  int64_t* out;
  Cosines cosines = Cosines::kAutomatic;
  int threads = kRoundThreads;
};

// Bytes of workspace, from host integers alone; with memory also the call itself.
template <class T, class Stream>
size_t mmr(Stream& stream, const MmrCall& call, unsigned char* memory) {
  Arena arena(memory);
  GreedyLaunch<T> launch(stream, call.rows, call.segments, call.threads, arena);
  GreedyProblem& problem = launch.problem;
  float* const norms = arena.take<float>(all_tokens(call.segments));
  float* const matrix = stored(call.cosines, call.segments) ? arena.take<float>(pairs(call.segments)) : nullptr;
  if (!memory) return arena.used();
  const Segments& all = problem.segments = ascending(stream, call.segments, problem.offsets);
  inverse_norms<T>(stream, all, call.rows, norms);
  if (matrix) all_pairs<T>(stream, all, call.rows, norms, nullptr, matrix);
  problem.norms = norms;
  problem.matrix = matrix;
  problem.importance = call.importance;
  problem.lam = float(call.lam);
  problem.rest = float(1.0 - call.lam);
  problem.per_round = call.per_round;
  problem.block = round_size(call.block);
  problem.sort = call.sort;
  problem.out = call.out;
  launch.run(stream);
  return arena.used();
}

}  // namespace flashprune::gpu
