// Video Compression Commander (VidCom2, arXiv 2505.14454): tokens unlike their video and their frame, more of them from
// frames that stand out.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <iterator>
#include <numeric>
#include <vector>

#include "flashprune/order.h"
#include "flashprune/rows.h"
#include "flashprune/topk.h"

namespace flashprune {

// The half of the channels whose variance over all rows is lowest, ascending. Rows are read in a fixed number of
// pieces, whose means and squares are joined in order (Chan's formula): the same bits for any number of threads.
inline std::vector<int> steady_channels(const Rows& rows, const ParallelFor& parallel) {
  const int64_t n = rows.size(), d = rows.width();
  const int pieces = int(std::min<int64_t>(64, n));
  const auto begin = [&](int piece) { return n * piece / pieces; };
  RowBuffer means(pieces, d), squares(pieces, d);
  parallel(pieces, [&](int piece) {
    RowBuffer row(1, d);
    std::fill_n(means[piece], d, 0.0f);
    std::fill_n(squares[piece], d, 0.0f);
    for (int64_t i = begin(piece); i < begin(piece + 1); ++i) {
      rows.read(int(i), row[0]);
      kernels().moments(row[0], d, 1.0f / float(i - begin(piece) + 1), means[piece], squares[piece]);
    }
  });
  std::vector<double> mean(size_t(d), 0.0), square(size_t(d), 0.0);
  for (int piece = 0; piece < pieces; ++piece) {
    const double before = double(begin(piece)), after = double(begin(piece + 1));
    const double share = (after - before) / after;
    for (int64_t c = 0; c < d; ++c) {
      const double step = means[piece][c] - mean[c];
      mean[c] += step * share;
      square[c] += squares[piece][c] + step * step * before * share;
    }
  }
  std::vector<float> steadiness(static_cast<size_t>(d));
  std::transform(square.begin(), square.end(), steadiness.begin(), [&](double sum) { return -float(sum / double(n)); });
  std::vector<int> channels = topk_select(steadiness.data(), int(d), int(std::max<int64_t>(1, d / 2)));
  std::sort(channels.begin(), channels.end());
  return channels;
}

// Rows over some of their channels, divided by their norm over these; zeros where inverse_norm is 0.
class ChannelRows {
 public:
  ChannelRows(const Rows& rows, const std::vector<int>& channels)
      : rows_(rows), channels_(channels), whole_(1, rows.width()), unit_(1, width()) {}

  int64_t width() const { return int64_t(channels_.size()); }

  const float* load(int i) {
    const Kernels& kernel = kernels();
    float* unit = unit_[0];
    rows_.read(i, whole_[0]);
    for (size_t c = 0; c < channels_.size(); ++c) unit[c] = whole_[0][channels_[c]];
    std::fill(unit + width(), unit + row_stride(width()), 0.0f);
    float squared;
    kernel.dots(&unit, 1, &unit, 1, width(), &squared, 1);
    if (const float inverse = inverse_norm(squared); inverse > 0.0f) {
      kernel.scale(unit, width(), inverse);
    } else {
      std::fill_n(unit, width(), 0.0f);
    }
    return unit;
  }

 private:
  const Rows& rows_;
  const std::vector<int>& channels_;
  RowBuffer whole_, unit_;
};

// A sum of Gaussians of a squared distance, of variances 1/8 to 2.
inline float closeness(float distance) {
  float sum = 0.0f;
  for (const float rate : {4.0f, 2.0f, 1.0f, 0.5f, 0.25f}) sum += std::exp(-distance * rate);
  return sum;
}

// Tokens for each frame, from its tokens' mean closeness to the video: the less, the more.
inline std::vector<int> frame_budgets(const std::vector<float>& closeness, int places, float keep) {
  constexpr float kTemperature = 0.01f;
  const float least = *std::min_element(closeness.begin(), closeness.end()), frames = float(closeness.size());
  std::vector<float> weights(closeness.size());
  std::transform(closeness.begin(), closeness.end(), weights.begin(),
                 [&](float x) { return std::exp((least - x) / kTemperature); });
  const float sum = float(std::accumulate(weights.begin(), weights.end(), 0.0));
  for (float& weight : weights) weight /= sum;
  const float mean = float(std::accumulate(weights.begin(), weights.end(), 0.0)) / frames;
  std::vector<int> budgets(closeness.size());
  std::transform(weights.begin(), weights.end(), budgets.begin(), [&](float weight) {
    const float scale = std::min(keep * (1.0f + weight - mean), 1.0f);
    return std::clamp(int(std::nearbyint(scale * float(places))), 1, places);  // halves to even
  });
  return budgets;
}

// The k tokens least similar to video and frame: those within their frame's budget before the others. In that order.
inline std::vector<int> choose_by_frame(const std::vector<float>& similarity, const std::vector<int>& budgets,
                                        int places, int k) {
  std::vector<Key> within, beyond;
  for (int frame = 0; frame < int(budgets.size()); ++frame) {
    std::vector<Key> keys(static_cast<size_t>(places));
    for (int i = 0; i < places; ++i) {
      const int token = frame * places + i;
      keys[size_t(i)] = make_key(-similarity[size_t(token)], token);
    }
    const auto end = keys.begin() + budgets[size_t(frame)];
    std::nth_element(keys.begin(), end, keys.end(), std::greater<>());
    within.insert(within.end(), keys.begin(), end);
    beyond.insert(beyond.end(), end, keys.end());
  }
  std::vector<int> picks;
  for (std::vector<Key>* keys : {&within, &beyond}) {
    const auto end = keys->begin() + std::min<std::ptrdiff_t>(std::ssize(*keys), k - std::ssize(picks));
    std::nth_element(keys->begin(), end, keys->end(), std::greater<>());
    std::sort(keys->begin(), end, std::greater<>());
    std::transform(keys->begin(), end, std::back_inserter(picks), key_index);
  }
  return picks;
}

// rows: frames one after another; keep: the share that a frame keeps on average. Each row is read three times: for the
// variances, for the centres, for the distances to them.
inline std::vector<int> vidcom2_select(const Rows& rows, int frames, float keep, int k, const ParallelFor& parallel) {
  const int places = rows.size() / frames;
  const std::vector<int> channels = steady_channels(rows, parallel);
  const int64_t width = int64_t(channels.size());

  RowBuffer centres(frames, width), video(1, width);
  parallel(frames, [&](int frame) {
    ChannelRows units(rows, channels);
    float* centre = centres[frame];
    std::fill_n(centre, row_stride(width), 0.0f);
    for (int i = 0; i < places; ++i) {
      const float* unit = units.load(frame * places + i);
      for (int64_t c = 0; c < width; ++c) centre[c] += unit[c];
    }
    for (int64_t c = 0; c < width; ++c) centre[c] /= float(places);
  });
  std::fill_n(video[0], row_stride(width), 0.0f);
  for (int64_t c = 0; c < width; ++c) {
    double sum = 0.0;
    for (int frame = 0; frame < frames; ++frame) sum += centres[frame][c];
    video[0][c] = float(sum / frames);
  }

  std::vector<float> similarity(size_t(rows.size())), to_video(static_cast<size_t>(frames));
  parallel(frames, [&](int frame) {
    ChannelRows units(rows, channels);
    double sum = 0.0;
    for (int i = 0; i < places; ++i) {
      const int token = frame * places + i;
      const float* unit = units.load(token);
      const float near = closeness(kernels().distance(unit, video[0], width));
      similarity[size_t(token)] = near + closeness(kernels().distance(unit, centres[frame], width));
      sum += near;
    }
    to_video[size_t(frame)] = float(sum / places);
  });
  return choose_by_frame(similarity, frame_budgets(to_video, places, keep), places, k);
}

}  // namespace flashprune
