// Efficient Video Sampling (EVS, arXiv 2510.14624).
#pragma once

#include <limits>
#include <vector>

#include "flashprune/rows.h"
#include "flashprune/topk.h"

namespace flashprune {

// The k tokens that differ most from the token at their place in the frame before, the first frame's before all others;
// best first. rows: frames one after another. A place is followed through all frames, so every row is read once.
inline std::vector<int> evs_select(Rows& rows, int frames, int k, const ParallelFor& parallel) {
  const int places = rows.size() / frames;
  std::vector<float> dissimilarity(size_t(rows.size()), std::numeric_limits<float>::infinity());
  parallel(places, [&](int place) {
    RowBuffer buffer(2, rows.width());
    rows.load(place, buffer[0]);
    for (int frame = 1; frame < frames; ++frame) {
      const int token = frame * places + place;
      float* row = buffer[frame % 2];
      const float* before = buffer[(frame - 1) % 2];
      rows.load(token, row);
      float cosine;
      kernels().dots(&before, 1, &row, 1, rows.width(), &cosine, 1);
      dissimilarity[size_t(token)] = 1.0f - cosine;
    }
  });
  return topk_select(dissimilarity.data(), rows.size(), k);
}

}  // namespace flashprune
