#include "flashprune/vidcom2.h"

#include "segments.h"

namespace flashprune {

Tensor vidcom2_cpu(const Tensor& features, int64_t frames, double keep, int64_t k, bool sort) {
  const Features x(features);
  const Segments video(features, x.token_dims(), "features", {k}, std::nullopt);
  check_frames(features, frames);
  check(keep >= 0.0 && keep <= 1.0, "keep: expected a number in [0, 1], got " + std::to_string(keep));
  return video.run(sort, [&](const Segment& s, const ParallelFor& parallel) {
    return vidcom2_select(x.rows(s), int(frames), float(keep), int(s.k), parallel);
  });
}

}  // namespace flashprune

STABLE_TORCH_LIBRARY_IMPL(flashprune, CPU, m) { m.impl("vidcom2_select", TORCH_BOX(&flashprune::vidcom2_cpu)); }
