// The exact lazy blocked greedy behind MMR, MIS, max-min and DPP.
//
// All four repeat "take the best token, then lower the others by their similarity to it", and in all four a score never
// rises. A score that has not seen the latest picks is therefore an upper bound (Minoux 1978), and a token needs its
// similarities only once its bound comes up for choice:
//
//   repeat
//     block      = the tokens with the best bounds
//     bound      = best bound outside the block
//     bring the block up to date with the picks it has not seen, each token only while it beats the bound
//     contenders = block tokens that still beat the bound in the total order
//     among the contenders: take the best while it beats the bound, lower the others
//   until K picks
//
// The picks are those of the plain loop, for any block size. Work: one dot product for each (token, pick) pair that
// matters, in products of [block, picks], and half a [contenders, contenders] product a round. Counted on photographs
// of 2,880 to 16,384 patches, K = N / 10 to N / 4, everything included, as a share of N * K: MMR 25-37 %, MIS 9-25 %,
// DPP 35-64 %, max-min 74-77 % (its first pick takes a part). Memory: K + block rows, never N^2.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "flashprune/kernels.h"
#include "flashprune/order.h"
#include "flashprune/rows.h"

namespace flashprune {

struct GreedyOptions {
  int block = 0;      // tokens a round; 0: chosen here. Any value gives the same picks.
  int per_round = 1;  // picks taken from one scoring without comparing them with each other
};

// Policy, for tokens i and picks t = 0, 1, ... in the order they were made:
//
//   Key key(int i)
//     The token's place in the order by what it has absorbed; kNoKey: it is out.
//   void absorb(int i, int t, float cosine)
//     Lowers token i by pick t. Called once for each t, ascending; touches token i alone.
//   void picked(int i, int t)
//     Token i became pick t, having absorbed all picks that count before it.
//   static constexpr bool kWindowed
//     Most pairs need no cosine at all. Then also:
//   bool near(int i, int j)
//     Whether the pair needs one.
//   void near_picks(int i, int from, std::vector<int>& out)
//     Picks t >= from that are near token i, ascending.
template <class Policy>
class Greedy {
 public:
  Greedy(Rows& rows, Policy& policy, int k, const GreedyOptions& options, const ParallelFor& parallel)
      : rows_(rows),
        policy_(policy),
        k_(k),
        per_round_(std::max(options.per_round, 1)),
        block_(options.block > 0 ? options.block : kBlock),
        parallel_(parallel),
        pick_rows_(k, rows.width()),
        block_rows_(std::min(block_, rows.size()), rows.width()),
        seen_(size_t(rows.size()), 0) {
    picks_.reserve(size_t(k));
    pick_pointers_.reserve(size_t(k));
  }

  const std::vector<int>& picks() const { return picks_; }

  // Makes a pick that is decided elsewhere. Seeds count as one round.
  void seed(int i) {
    rows_.load(i, pick_rows_[int64_t(picks_.size())]);
    push_pick(i);
    committed_ = int(picks_.size());
  }

  // Brings all the tokens up to date. Needed where a token's key before its first cosine is no upper bound.
  void absorb_seeds(const std::vector<int>& tokens) {
    for (size_t begin = 0; begin < tokens.size(); begin += size_t(block_)) {
      const size_t end = std::min(begin + size_t(block_), tokens.size());
      block_tokens_.assign(tokens.begin() + begin, tokens.begin() + end);
      refresh_block(kNoKey);
    }
  }

  // Fills up to k picks from the given tokens, or until none has a key.
  void run(const std::vector<int>& tokens) {
    heap_.clear();
    for (int i : tokens) {
      if (const Key key = policy_.key(i); key != kNoKey) heap_.push_back(key);
    }
    std::make_heap(heap_.begin(), heap_.end());
    while (int(picks_.size()) < k_ && !heap_.empty()) round();
  }

 private:
  static constexpr int kBlock = 128;
  static constexpr int kGramRows = 24;
  static constexpr int kChunk = 64;  // picks a product, and most rows a task: 64 rows of a stretch are 256 KB,
  static constexpr int kRows = 64;   // so that both sides stay in the L2 cache

  // Rows a task: few enough that every thread has some, enough that a tile of picks is used several times.
  int tasks_for(int rows) const {
    const int size = std::clamp((rows + parallel_.threads - 1) / parallel_.threads, kRows / 4, kRows);
    return (rows + size - 1) / size;
  }

  void push_pick(int i) {
    const int t = int(picks_.size());
    picks_.push_back(i);
    pick_pointers_.push_back(pick_rows_[t]);
    policy_.picked(i, t);
  }

  void round() {
    pop_block();
    const Key bound = heap_.empty() ? kNoKey : heap_.front();
    refresh_block(bound);
    const int size = int(block_tokens_.size());

    contenders_.clear();
    for (int r = 0; r < size; ++r) {
      const Key key = policy_.key(block_tokens_[r]);
      if (key > bound) {
        contenders_.push_back({key, block_tokens_[r], r});
      } else if (key != kNoKey) {
        push_heap(key);
      }
    }
    if (contenders_.empty()) return;
    resolve(bound);
    for (const Contender& c : contenders_) {
      if (c.key != kNoKey) push_heap(c.key);
    }
  }

  void push_heap(Key key) {
    heap_.push_back(key);
    std::push_heap(heap_.begin(), heap_.end());
  }

  void pop_block() {
    block_tokens_.clear();
    while (int(block_tokens_.size()) < block_ && !heap_.empty()) {
      std::pop_heap(heap_.begin(), heap_.end());
      block_tokens_.push_back(key_index(heap_.back()));
      heap_.pop_back();
    }
    // Tokens that miss the same picks side by side share a product without waste.
    std::sort(block_tokens_.begin(), block_tokens_.end(),
              [&](int a, int b) { return seen_[a] != seen_[b] ? seen_[a] < seen_[b] : a < b; });
  }

  // Brings the block up to date: loads its rows and lets them absorb the committed picks they have not seen. A token
  // that no longer beats the bound stops where it is.
  void refresh_block(Key bound) {
    const int size = int(block_tokens_.size());
    const int tasks = tasks_for(size);
    parallel_(tasks, [&](int task) {
      int rows[kRows];
      int count = 0;
      for (int r = task; r < size; r += tasks) {  // dealt out in turn: each task has as many old tokens as new ones
        rows_.load(block_tokens_[r], block_rows_[r]);
        rows[count++] = r;
      }
      if constexpr (Policy::kWindowed) {
        refresh_near(rows, count);
      } else {
        refresh(rows, count, bound);
      }
    });
  }

  // rows: of the block, those that have seen least first.
  void refresh(const int* rows, int count, Key bound) {
    int active[kRows];
    const float* a[kRows];
    float cosines[kRows * kChunk];
    int joined = 0, size = 0;
    for (int chunk = 0; chunk < committed_;) {
      if (size == 0) {
        if (joined == count) return;
        chunk = std::max(chunk, seen_[block_tokens_[rows[joined]]]);
      }
      const int n = std::min(kChunk, committed_ - chunk);
      for (; joined < count && seen_[block_tokens_[rows[joined]]] < chunk + n; ++joined) active[size++] = rows[joined];
      for (int r = 0; r < size; ++r) a[r] = block_rows_[active[r]];
      kernels().dots(a, size, &pick_pointers_[chunk], n, rows_.width(), cosines, n);
      int left = 0;
      for (int r = 0; r < size; ++r) {
        const int token = block_tokens_[active[r]];
        for (int& t = seen_[token]; t < chunk + n; ++t) policy_.absorb(token, t, cosines[r * n + t - chunk]);
        if (policy_.key(token) > bound) active[left++] = active[r];
      }
      size = left;
      chunk += n;
    }
  }

  void refresh_near(const int* rows, int count) {
    std::vector<int> near;
    std::vector<const float*> b;
    std::vector<float> cosines;
    for (int r = 0; r < count; ++r) {
      const int token = block_tokens_[rows[r]];
      near.clear();
      policy_.near_picks(token, seen_[token], near);
      b.clear();
      for (int t : near) b.push_back(pick_pointers_[t]);
      cosines.resize(near.size());
      const float* a = block_rows_[rows[r]];
      kernels().dots(&a, 1, b.data(), int(b.size()), rows_.width(), cosines.data(), int64_t(b.size()));
      for (size_t s = 0; s < near.size(); ++s) policy_.absorb(token, near[s], cosines[s]);
      seen_[token] = committed_;
    }
  }

  struct Contender {
    Key key;
    int token;
    int row;  // in block_rows_, and in gram_ once that is built
  };

  // gram_[r * c + s] for r < s: cosine of contenders r and s (for a windowed policy only where they are near).
  void build_gram() {
    const int c = int(contenders_.size());
    gram_.resize(size_t(c) * size_t(c));
    contender_rows_.clear();
    for (int r = 0; r < c; ++r) contender_rows_.push_back(block_rows_[contenders_[r].row]);
    parallel_((c + kGramRows - 1) / kGramRows, [&](int task) {
      const int begin = task * kGramRows, end = std::min(begin + kGramRows, c);
      if constexpr (Policy::kWindowed) {
        std::vector<int> near;
        std::vector<const float*> b;
        std::vector<float> cosines;
        for (int r = begin; r < end; ++r) {
          near.clear();
          b.clear();
          for (int s = r + 1; s < c; ++s) {
            if (!policy_.near(contenders_[r].token, contenders_[s].token)) continue;
            near.push_back(s);
            b.push_back(contender_rows_[s]);
          }
          cosines.resize(near.size());
          kernels().dots(&contender_rows_[r], 1, b.data(), int(b.size()), rows_.width(), cosines.data(),
                         int64_t(b.size()));
          for (size_t s = 0; s < near.size(); ++s) gram_[size_t(r) * c + near[s]] = cosines[s];
        }
      } else {
        kernels().dots(&contender_rows_[begin], end - begin, &contender_rows_[begin], c - begin, rows_.width(),
                       &gram_[size_t(begin) * c + begin], c);
      }
    });
  }

  // Picks among the contenders while the best of them beats everything outside.
  void resolve(Key bound) {
    std::sort(contenders_.begin(), contenders_.end(), [](const auto& a, const auto& b) { return a.key > b.key; });
    build_gram();
    const int c = int(contenders_.size());
    const int first_pick = int(picks_.size());
    std::vector<int> picked_rows;  // of this round, as rows of gram_
    while (int(picks_.size()) < k_) {
      int best = -1;
      for (int r = 0; r < c; ++r) {
        if (contenders_[r].key > (best < 0 ? bound : contenders_[best].key)) best = r;
      }
      if (best < 0) break;
      const int t = int(picks_.size());
      std::copy_n(contender_rows_[best], row_stride(rows_.width()), pick_rows_[t]);
      contenders_[best].key = kNoKey;
      push_pick(contenders_[best].token);
      picked_rows.push_back(best);
      if ((t + 1 - committed_) < per_round_) continue;
      const int from = committed_;
      committed_ = t + 1;
      // A group of picks that began in an earlier round: those picks are not in gram_, the next refresh has them.
      if (from < first_pick) break;
      for (int r = 0; r < c; ++r) {
        if (contenders_[r].key == kNoKey) continue;
        const int token = contenders_[r].token;
        for (int u = from; u < committed_; ++u) {
          const int p = picked_rows[u - first_pick];
          if constexpr (Policy::kWindowed) {
            if (!policy_.near(token, picks_[u])) continue;
          }
          policy_.absorb(token, u, gram_[size_t(std::min(p, r)) * c + std::max(p, r)]);
        }
        seen_[token] = committed_;
        contenders_[r].key = policy_.key(token);
      }
    }
  }

  Rows& rows_;
  Policy& policy_;
  const int k_;
  const int per_round_;
  const int block_;
  const ParallelFor& parallel_;
  RowBuffer pick_rows_;
  RowBuffer block_rows_;
  std::vector<int> picks_;
  std::vector<const float*> pick_pointers_;
  int committed_ = 0;      // picks that tokens may absorb: the complete groups of per_round
  std::vector<int> seen_;  // picks each token has absorbed
  std::vector<Key> heap_;  // keys of the tokens outside the block, stale or fresh
  std::vector<int> block_tokens_;
  std::vector<Contender> contenders_;
  std::vector<const float*> contender_rows_;
  std::vector<float> gram_;
};

}  // namespace flashprune
