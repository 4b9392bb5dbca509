#include "flashprune/evs.h"

#include "segments.h"

namespace flashprune {

Tensor evs_cpu(const Tensor& features, int64_t frames, int64_t k, bool sort) {
  const Features x(features);
  const Segments video(features, x.token_dims(), "features", {k}, std::nullopt);
  check_frames(features, frames);
  return video.run(sort, [&](const Segment& s, const ParallelFor& parallel) {
    Rows rows = x.rows(s);
    return evs_select(rows, int(frames), int(s.k), parallel);
  });
}

}  // namespace flashprune

STABLE_TORCH_LIBRARY_IMPL(flashprune, CPU, m) { m.impl("evs_select", TORCH_BOX(&flashprune::evs_cpu)); }
