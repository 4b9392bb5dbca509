// The edge rule of an independent set: alpha * similarity + (1 - alpha) * proximity > threshold, each step rounded as
// in the reference. Proximity is a float64 expression there. Since the sum never falls when proximity rises, most pairs
// are decided by its bounds or by a float32 estimate, and only the rest computes it.
#pragma once

#include <cmath>

#include "flashprune/block.cuh"
#include "flashprune/launch.cuh"

namespace flashprune::gpu {

enum class Proximity { kChebyshev, kGaussian, kLinear };

struct Place {
  int32_t t, y, x;
};

__device__ __forceinline__ uint32_t distance(int32_t a, int32_t b) {
  return a > b ? uint32_t(a) - uint32_t(b) : uint32_t(b) - uint32_t(a);
}

struct EdgeRule {
  static constexpr float kCosineMargin = 1e-4f;     // how far rounding may carry a cosine above 1
  static constexpr float kProximityMargin = 1e-5f;  // well beyond the error of estimate()

  float alpha, beta, threshold;
  bool half_cosine;
  bool spatial;  // alpha < 1
  Proximity proximity;
  uint32_t radius, temporal_radius;
  double sigma;
  const int32_t* positions;  // [all tokens, 3]: t, y, x; read if spatial
  double* diagonals;         // [segments], of the boxes around their places; linear proximity alone

  EdgeRule(double alpha, double threshold, bool half_cosine, Proximity proximity, int64_t radius, double sigma,
           int64_t temporal_radius, const int32_t* positions)
      : alpha(float(alpha)),
        beta(float(1.0 - alpha)),
        threshold(float(threshold)),
        half_cosine(half_cosine),
        spatial(alpha < 1.0),
        proximity(proximity),
        radius(uint32_t(radius)),
        temporal_radius(uint32_t(temporal_radius)),
        sigma(sigma),
        positions(positions),
        diagonals(nullptr) {}

  bool linear() const { return spatial && proximity == Proximity::kLinear; }

  __device__ Place place(int64_t token) const {
    return {positions[3 * token], positions[3 * token + 1], positions[3 * token + 2]};
  }

  __device__ bool edge(float cosine, const Place& a, const Place& b, double diagonal) const {
    const float similarity = half_cosine ? __fdiv_rn(__fadd_rn(1.0f, cosine), 2.0f) : cosine;
    if (!spatial) return similarity > threshold;
    const float weight = __fmul_rn(alpha, similarity);
    if (distance(a.t, b.t) > temporal_radius) return enough(weight, 0.0f);
    if (proximity == Proximity::kChebyshev) return enough(weight, chebyshev(a, b));
    if (enough(weight, 0.0f)) return true;
    if (!enough(weight, 1.0f)) return false;
    const float guess = estimate(a, b, diagonal);
    if (guess == guess) {
      const bool least = enough(weight, guess - kProximityMargin);
      if (least == enough(weight, guess + kProximityMargin)) return least;
    }
    return enough(weight, exact(a, b, diagonal));
  }

  // Whether the pair may be an edge whatever its cosine is; never false for one that is.
  __device__ bool possible(const Place& a, const Place& b, double diagonal) const {
    if (!spatial) return true;
    const float similarity = half_cosine ? 1.0f + kCosineMargin / 2.0f : 1.0f + kCosineMargin;
    float most = 0.0f;
    if (distance(a.t, b.t) <= temporal_radius) {
      if (proximity == Proximity::kChebyshev) {
        most = chebyshev(a, b);
      } else {
        const float guess = estimate(a, b, diagonal);
        most = guess == guess ? guess + kProximityMargin : 1.0f;
      }
    }
    return enough(alpha * similarity, most);
  }

  // Places that are possible for one token, itself included; negative where the bound is not known to the host.
  int64_t window() const {
    if (!spatial) return -1;
    const double similarity = half_cosine ? 1.0 + kCosineMargin / 2.0 : 1.0 + kCosineMargin;
    const double least = (double(threshold) - double(alpha) * similarity) / double(beta) - 2.0 * kProximityMargin;
    if (least <= 0.0 || proximity == Proximity::kLinear) return -1;
    const double reach = proximity == Proximity::kChebyshev
                             ? double(radius)
                             : std::floor(sigma * std::sqrt(-2.0 * std::log(least < 1.0 ? least : 1.0)));
    const double places = (2.0 * reach + 1.0) * (2.0 * reach + 1.0) * (2.0 * double(temporal_radius) + 1.0);
    return places < 1e9 ? int64_t(places) : -1;
  }

 private:
  __device__ bool enough(float weight, float near) const {
    return __fadd_rn(weight, __fmul_rn(beta, near)) > threshold;
  }

  __device__ float chebyshev(const Place& a, const Place& b) const {
    return max(distance(a.y, b.y), distance(a.x, b.x)) <= radius ? 1.0f : 0.0f;
  }

  // exact() but for a small error; NaN where float32 cannot tell.
  __device__ float estimate(const Place& a, const Place& b, double diagonal) const {
    const float dy = float(distance(a.y, b.y)), dx = float(distance(a.x, b.x));
    const float square = dy * dy + dx * dx;
    if (proximity == Proximity::kGaussian) {
      const float width = float(2.0 * sigma * sigma);
      return expf(-square / width);
    }
    return diagonal > 0.0 ? fmaxf(1.0f - sqrtf(square) / float(diagonal), 0.0f) : 1.0f;
  }

  __device__ float exact(const Place& a, const Place& b, double diagonal) const {
    const double dy = double(distance(a.y, b.y)), dx = double(distance(a.x, b.x));
    const double square = __dadd_rn(__dmul_rn(dy, dy), __dmul_rn(dx, dx));
    if (proximity == Proximity::kGaussian) return float(exp(-square / (2.0 * sigma * sigma)));
    const double near = diagonal > 0.0 ? 1.0 - sqrt(square) / diagonal : 1.0;
    return near > 0.0 ? float(near) : 0.0f;
  }
};

// Diagonal of the box around a segment's places. By a whole block; bounds: [4 kMostWarps] ints of shared memory.
__device__ __forceinline__ void write_diagonal(const Segments& all, int s, const EdgeRule& rule, int* bounds) {
  const Segment segment(all, s);
  int low_y = INT32_MAX, high_y = INT32_MIN, low_x = INT32_MAX, high_x = INT32_MIN;
  for (int i = int(threadIdx.x); i < segment.n; i += int(blockDim.x)) {
    const Place place = rule.place(segment.start + i);
    low_y = min(low_y, place.y);
    high_y = max(high_y, place.y);
    low_x = min(low_x, place.x);
    high_x = max(high_x, place.x);
  }
  low_y = __reduce_min_sync(kAllLanes, low_y);
  high_y = __reduce_max_sync(kAllLanes, high_y);
  low_x = __reduce_min_sync(kAllLanes, low_x);
  high_x = __reduce_max_sync(kAllLanes, high_x);
  if (lane_index() == 0) {
    bounds[4 * warp_index()] = low_y;
    bounds[4 * warp_index() + 1] = high_y;
    bounds[4 * warp_index() + 2] = low_x;
    bounds[4 * warp_index() + 3] = high_x;
  }
  __syncthreads();
  if (threadIdx.x == 0 && segment.n > 0) {
    for (int w = 1; w < int(blockDim.x) / 32; ++w) {
      low_y = min(low_y, bounds[4 * w]);
      high_y = max(high_y, bounds[4 * w + 1]);
      low_x = min(low_x, bounds[4 * w + 2]);
      high_x = max(high_x, bounds[4 * w + 3]);
    }
    const double height = double(distance(high_y, low_y)), width = double(distance(high_x, low_x));
    rule.diagonals[s] = sqrt(__dadd_rn(__dmul_rn(height, height), __dmul_rn(width, width)));
  }
  __syncthreads();
}

}  // namespace flashprune::gpu
