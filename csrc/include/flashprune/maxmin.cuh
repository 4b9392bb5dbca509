// Max-min diversity (DivPrune, arXiv 2503.02175): three launches, four for packed segments. The first pick is the token
// whose nearest other token is farthest, half a product of all pairs; the rest are those of MMR where importance and
// both weights are 1.
#pragma once

#include "flashprune/greedy.cuh"

namespace flashprune::gpu {

struct MaxminCall {
  Rows rows;
  Segments segments;
  int block;  // tokens a round; 0: chosen here. Any value gives the same picks.
  bool sort;
  int64_t* out;
  Cosines cosines = Cosines::kAutomatic;
  int threads = kRoundThreads;
};

// Bytes of workspace, from host integers alone; with memory also the call itself.
template <class T, class Stream>
size_t maxmin(Stream& stream, const MaxminCall& call, unsigned char* memory) {
  Arena arena(memory);
  GreedyLaunch<T> launch(stream, call.rows, call.segments, call.threads, arena);
  GreedyProblem& problem = launch.problem;
  float* const norms = arena.take<float>(all_tokens(call.segments));
  uint32_t* const isolation = arena.take<uint32_t>(all_tokens(call.segments));
  // All pairs are multiplied for the first pick: what fits is kept.
  float* const matrix = stored(call.cosines, call.segments) ? arena.take<float>(pairs(call.segments)) : nullptr;
  if (!memory) return arena.used();
  const Segments& all = problem.segments = ascending(stream, call.segments, problem.offsets);
  inverse_norms<T>(stream, all, call.rows, norms);
  all_pairs<T>(stream, all, call.rows, norms, isolation, matrix);
  problem.norms = norms;
  problem.matrix = matrix;
  problem.isolation = isolation;
  problem.lam = problem.rest = 1.0f;
  problem.per_round = 1;
  problem.block = round_size(call.block);
  problem.sort = call.sort;
  problem.out = call.out;
  launch.run(stream);
  return arena.used();
}

}  // namespace flashprune::gpu
