// Greedy maximal independent set in order of importance (D2Pruner, arXiv 2512.19443).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <map>
#include <vector>

#include "flashprune/greedy.h"
#include "flashprune/topk.h"

namespace flashprune {

enum class Similarity { kCosine, kHalfCosine };
enum class Proximity { kChebyshev, kGaussian, kLinear };

struct Position {
  int32_t t, y, x;
};

struct GraphOptions {
  double alpha = 1.0;
  double threshold = 0.8;
  Similarity similarity = Similarity::kCosine;
  Proximity proximity = Proximity::kChebyshev;
  int64_t radius = 1;
  double sigma = 1.0;
  int64_t temporal_radius = 0;
};

// The edge rule of one segment: alpha * similarity + (1 - alpha) * proximity > threshold.
class Graph {
 public:
  // positions: one a token; may be empty when alpha is 1.
  Graph(const GraphOptions& options, std::vector<Position> positions)
      : options_(options),
        positions_(std::move(positions)),
        alpha_(float(options.alpha)),
        beta_(float(1.0 - options.alpha)),
        threshold_(float(options.threshold)),
        spatial_(options.alpha < 1.0),
        diagonal_(spatial_ ? bounding_diagonal() : 0.0),
        // The least proximity that an edge needs, with room for a cosine that rounding carried above 1.
        least_proximity_(spatial_ ? (options.threshold - options.alpha * (1.0 + 1e-4)) / (1.0 - options.alpha) : 0.0) {}

  bool edge(int i, int j, float cosine) const {
    const float similarity = options_.similarity == Similarity::kCosine ? cosine : (1.0f + cosine) / 2.0f;
    return alpha_ * similarity + (spatial_ ? beta_ * proximity(i, j) : 0.0f) > threshold_;
  }

  float proximity(int i, int j) const {
    const Position &a = positions_[size_t(i)], &b = positions_[size_t(j)];
    if (std::abs(int64_t(a.t) - b.t) > options_.temporal_radius) return 0.0f;
    const double dy = double(a.y) - b.y, dx = double(a.x) - b.x;
    switch (options_.proximity) {
      case Proximity::kChebyshev:
        return std::max(std::abs(dy), std::abs(dx)) <= double(options_.radius) ? 1.0f : 0.0f;
      case Proximity::kGaussian:
        return float(std::exp(-(dy * dy + dx * dx) / (2.0 * options_.sigma * options_.sigma)));
      case Proximity::kLinear:
        break;
    }
    return diagonal_ > 0.0 ? float(std::max(0.0, 1.0 - std::sqrt(dy * dy + dx * dx) / diagonal_)) : 1.0f;
  }

  // Whether (i, j) can be an edge whatever its cosine.
  bool near(int i, int j) const { return double(proximity(i, j)) > least_proximity_ - 1e-6; }

  // Reach of an edge in y and x; negative: unbounded, every pair needs its cosine.
  int64_t reach() const {
    if (!spatial_ || least_proximity_ <= 1e-5) return -1;
    const double least = std::min(1.0, least_proximity_ - 1e-5);
    switch (options_.proximity) {
      case Proximity::kChebyshev:
        return options_.radius;
      case Proximity::kGaussian:
        return int64_t(std::ceil(options_.sigma * std::sqrt(-2.0 * std::log(least)))) + 1;
      case Proximity::kLinear:
        break;
    }
    return int64_t(std::ceil((1.0 - least) * diagonal_)) + 1;
  }

  const Position& position(int i) const { return positions_[size_t(i)]; }
  int64_t temporal_radius() const { return options_.temporal_radius; }

 private:
  double bounding_diagonal() const {
    if (positions_.empty()) return 0.0;
    const auto [y0, y1] = std::minmax_element(positions_.begin(), positions_.end(),
                                              [](const Position& a, const Position& b) { return a.y < b.y; });
    const auto [x0, x1] = std::minmax_element(positions_.begin(), positions_.end(),
                                              [](const Position& a, const Position& b) { return a.x < b.x; });
    return std::hypot(double(y1->y) - y0->y, double(x1->x) - x0->x);
  }

  GraphOptions options_;
  std::vector<Position> positions_;
  float alpha_, beta_, threshold_;
  bool spatial_;
  double diagonal_;
  double least_proximity_;
};

// kBanded: edges reach only `reach` grid steps; picks are kept in square cells of that size, and a token looks into the
// cells around its own.
template <bool kBanded>
class MisPolicy {
 public:
  static constexpr bool kWindowed = kBanded;

  MisPolicy(const Graph& graph, const float* importance, int n)
      : graph_(graph),
        importance_(importance),
        struck_(size_t(n), 0),
        cell_size_(std::max<int64_t>(graph.reach(), 1)) {}

  Key key(int i) const { return struck_[size_t(i)] ? kNoKey : make_key(importance_[i], i); }

  void absorb(int i, int t, float cosine) {
    if (!struck_[size_t(i)] && graph_.edge(i, picks_[size_t(t)], cosine)) struck_[size_t(i)] = 1;
  }

  void picked(int i, int t) {
    picks_.push_back(i);
    if constexpr (kBanded) cells_[cell(graph_.position(i))].push_back(t);
  }

  bool near(int i, int j) const { return graph_.near(i, j); }

  void near_picks(int i, int from, std::vector<int>& out) const {
    const Cell own = cell(graph_.position(i));
    // Frames are few: one range of the ordered map a row of cells.
    for (auto frame = cells_.lower_bound({own.t - graph_.temporal_radius(), INT64_MIN, INT64_MIN});
         frame != cells_.end() && frame->first.t <= own.t + graph_.temporal_radius();) {
      const int64_t t = frame->first.t;
      for (int64_t y = own.y - 1; y <= own.y + 1; ++y) {
        for (auto it = cells_.lower_bound({t, y, own.x - 1});
             it != cells_.end() && !(Cell{t, y, own.x + 1} < it->first); ++it) {
          for (int pick : it->second) {
            if (pick >= from && graph_.near(i, picks_[size_t(pick)])) out.push_back(pick);
          }
        }
      }
      frame = cells_.lower_bound({t + 1, INT64_MIN, INT64_MIN});
    }
    std::sort(out.begin(), out.end());
  }

 private:
  struct Cell {
    int64_t t, y, x;
    auto operator<=>(const Cell&) const = default;
  };

  Cell cell(const Position& p) const {
    const auto floor_div = [&](int64_t v) { return v >= 0 ? v / cell_size_ : -((-v + cell_size_ - 1) / cell_size_); };
    return {p.t, floor_div(p.y), floor_div(p.x)};
  }

  const Graph& graph_;
  const float* importance_;
  std::vector<char> struck_;
  const int64_t cell_size_;
  std::vector<int> picks_;
  std::map<Cell, std::vector<int>> cells_;
};

template <bool kBanded>
std::vector<int> mis_picks(Rows& rows, const float* importance, int k, const Graph& graph, std::vector<int> pivots,
                           bool pivots_suppress, const GreedyOptions& options, const ParallelFor& parallel) {
  MisPolicy<kBanded> policy(graph, importance, rows.size());
  const int budget = pivots_suppress ? k : k - int(pivots.size());
  Greedy<MisPolicy<kBanded>> greedy(rows, policy, budget, options, parallel);
  if (pivots_suppress) {
    for (int i : pivots) greedy.seed(i);
    pivots.clear();  // they are the first of greedy.picks()
    greedy.run(tokens_without(rows.size(), greedy.picks()));
  } else {
    greedy.run(tokens_without(rows.size(), pivots));
  }
  pivots.insert(pivots.end(), greedy.picks().begin(), greedy.picks().end());
  return pivots;
}

// k picks of rows: pivots, the independent set, then what is missing by importance alone.
inline std::vector<int> mis_select(Rows& rows, const float* importance, int k, const Graph& graph, int pivots,
                                   bool pivots_suppress, const GreedyOptions& options, const ParallelFor& parallel) {
  std::vector<int> first = topk_select(importance, rows.size(), pivots);
  const int64_t reach = graph.reach();
  const bool banded = reach >= 0 && (2 * reach + 1) * (2 * reach + 1) < rows.size() / 2;
  std::vector<int> picks =
      banded ? mis_picks<true>(rows, importance, k, graph, std::move(first), pivots_suppress, options, parallel)
             : mis_picks<false>(rows, importance, k, graph, std::move(first), pivots_suppress, options, parallel);
  fill_by_score(importance, rows.size(), k, picks);
  return picks;
}

}  // namespace flashprune
