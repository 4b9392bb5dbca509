#include "segments.h"

#include <algorithm>
#include <stdexcept>

#include "threads.h"

namespace flashprune {

using torch::headeronly::ScalarType;

void check(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

int block_size(int64_t block) {
  check(block >= 0 && block <= INT32_MAX, "block: expected 0 (automatic) or more, got " + std::to_string(block));
  return int(block);
}

namespace {

std::string shape_text(const Tensor& tensor, int64_t dims) {
  std::string text = "[";
  for (int64_t d = 0; d < dims; ++d) text += (d ? ", " : "") + std::to_string(tensor.size(d));
  return text + "]";
}

// Below this a team costs more than it saves: about 0.2 ms of one thread.
constexpr int64_t kLeastParallelElements = 1 << 18;

std::vector<int64_t> segment_bounds(const Tensor& cu_seqlens, int64_t tokens) {
  check(cu_seqlens.is_cpu() && cu_seqlens.dim() == 1 && cu_seqlens.scalar_type() == ScalarType::Int &&
            cu_seqlens.size(0) >= 1,
        "cu_seqlens: expected int32 [B + 1] on the CPU");
  const int64_t count = cu_seqlens.size(0), stride = cu_seqlens.stride(0);
  const int32_t* data = cu_seqlens.const_data_ptr<int32_t>();
  std::vector<int64_t> bounds;
  for (int64_t i = 0; i < count; ++i) bounds.push_back(data[i * stride]);
  check(bounds.front() == 0, "cu_seqlens: expected to start at 0, got " + std::to_string(bounds.front()));
  for (int64_t i = 1; i < count; ++i) {
    check(bounds[i] >= bounds[i - 1], "cu_seqlens: expected ascending values, got " + std::to_string(bounds[i - 1]) +
                                          " before " + std::to_string(bounds[i]) + " at " + std::to_string(i));
  }
  check(bounds.back() == tokens,
        "cu_seqlens: expected to end at T=" + std::to_string(tokens) + ", got " + std::to_string(bounds.back()));
  return bounds;
}

}  // namespace

void check_frames(const Tensor& features, int64_t frames) {
  check(features.dim() == 2, "features: expected [N, D] of one video, got " + shape_text(features, features.dim()));
  check(frames >= 1 && features.size(0) >= frames && features.size(0) % frames == 0,
        "frames: expected a divisor of N=" + std::to_string(features.size(0)) + ", got " + std::to_string(frames));
}

Segments::Segments(const Tensor& tokens, int64_t token_dims, const char* name, const std::vector<int64_t>& k,
                   const std::optional<Tensor>& cu_seqlens) {
  const auto add = [&](int64_t batch, int64_t begin, int64_t n, int64_t kept, int64_t base) {
    const int index = int(list_.size());
    check(n <= INT32_MAX, std::string(name) + ": more than 2^31 - 1 tokens in segment " + std::to_string(index));
    check(kept >= 0, "k=" + std::to_string(kept) + " is negative");
    check(kept <= n,
          "k=" + std::to_string(kept) + " exceeds N=" + std::to_string(n) + " in segment " + std::to_string(index));
    const int64_t offset = list_.empty() ? 0 : list_.back().offset + list_.back().k;
    list_.push_back({index, batch, begin, n, kept, offset, base});
  };
  if (cu_seqlens) {
    check(token_dims == 1, std::string(name) + ": expected packed tokens [T, ...] with cu_seqlens, got " +
                               shape_text(tokens, tokens.dim()));
    const std::vector<int64_t> bounds = segment_bounds(*cu_seqlens, tokens.size(0));
    check(k.size() + 1 == bounds.size(), "k: expected one entry a segment, " + std::to_string(bounds.size() - 1) +
                                             ", got " + std::to_string(k.size()));
    for (size_t s = 0; s < k.size(); ++s) add(0, bounds[s], bounds[s + 1] - bounds[s], k[s], bounds[s]);
    shape_ = {list_.empty() ? 0 : list_.back().offset + list_.back().k};
    return;
  }
  check(token_dims == 1 || token_dims == 2,
        std::string(name) + ": expected [N, ...] or [B, N, ...], got " + shape_text(tokens, tokens.dim()));
  check(k.size() == 1, "k: expected one entry without cu_seqlens, got " + std::to_string(k.size()));
  if (token_dims == 1) {
    add(0, 0, tokens.size(0), k[0], 0);
    shape_ = {k[0]};
  } else {
    for (int64_t b = 0; b < tokens.size(0); ++b) add(b, 0, tokens.size(1), k[0], 0);
    shape_ = {tokens.size(0), k[0]};
  }
}

Tensor Segments::run(bool sort, const Select& select) const {
  Tensor out = torch::stable::empty(shape_, ScalarType::Long);
  int64_t* data = out.mutable_data_ptr<int64_t>();
  const auto one = [&](const Segment& segment, const ParallelFor& parallel) {
    std::vector<int> picks = select(segment, parallel);
    if (sort) std::sort(picks.begin(), picks.end());
    for (int64_t i = 0; i < segment.k; ++i) data[segment.offset + i] = segment.base + picks[size_t(i)];
  };
  const int threads = elements_ < kLeastParallelElements ? 1 : int(torch::stable::get_num_threads());
  with_threads(threads, [&](const ParallelFor& parallel) {
    // Many segments: a thread each. Few: one after another, all threads inside.
    const int count = int(list_.size());
    if (count >= 2 * threads) {
      parallel(count, [&](int s) { one(list_[size_t(s)], {1, run_serially, parallel.poll}); });
    } else {
      for (const Segment& segment : list_) one(segment, parallel);
    }
  });
  return out;
}

Features::Features(const Tensor& features) : tensor_(features) {
  check(features.is_cpu(), "features: expected a CPU tensor");
  check(features.dim() == 2 || features.dim() == 3,
        "features: expected [N, D] or [B, N, D], got " + shape_text(features, features.dim()));
  switch (features.scalar_type()) {
    case ScalarType::Float:
      dtype_ = DType::kFloat32;
      break;
    case ScalarType::Half:
      dtype_ = DType::kFloat16;
      break;
    case ScalarType::BFloat16:
      dtype_ = DType::kBFloat16;
      break;
    default:
      check(false, "features: expected float32, float16 or bfloat16");
  }
  const int64_t last = features.dim() - 1;
  if (features.stride(last) != 1 && features.size(last) > 1) tensor_ = torch::stable::contiguous(features);
}

Rows Features::rows(const Segment& segment) const {
  const bool batched = tensor_.dim() == 3;
  const int64_t stride = tensor_.stride(batched ? 1 : 0);
  const int64_t first = (batched ? segment.batch * tensor_.stride(0) : 0) + segment.begin * stride;
  const char* data = static_cast<const char*>(tensor_.const_data_ptr()) + first * int64_t(tensor_.element_size());
  return Rows(data, dtype_, segment.n, tensor_.size(tensor_.dim() - 1), stride);
}

Scores::Scores(const Tensor& scores, const char* name) : tensor_(scores) {
  check(scores.is_cpu(), std::string(name) + ": expected a CPU tensor");
  const ScalarType type = scores.scalar_type();
  check(type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16,
        std::string(name) + ": expected float32, float16 or bfloat16");
  if (type != ScalarType::Float) tensor_ = torch::stable::to(tensor_, ScalarType::Float);
  tensor_ = torch::stable::contiguous(tensor_);
}

Scores::Scores(const Tensor& scores, const char* name, const Features& features) : Scores(scores, name) {
  bool same = scores.dim() == features.token_dims();
  for (int64_t d = 0; same && d < scores.dim(); ++d) same = scores.size(d) == features.tensor().size(d);
  check(same, std::string(name) + ": expected " + shape_text(features.tensor(), features.token_dims()) + ", got " +
                  shape_text(scores, scores.dim()));
}

const float* Scores::data(const Segment& segment) const {
  const int64_t items = tensor_.dim() == 2 ? segment.batch * tensor_.size(1) : 0;
  return tensor_.const_data_ptr<float>() + items + segment.begin;
}

}  // namespace flashprune
