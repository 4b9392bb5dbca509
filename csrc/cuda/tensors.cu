#include "tensors.h"

#include <algorithm>
#include <stdexcept>

#include "flashprune/host_ints.cuh"

namespace flashprune::gpu {

using torch::headeronly::ScalarType;

void check(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

namespace {

std::string shape_text(const Tensor& tensor, int64_t dims) {
  std::string text = "[";
  for (int64_t d = 0; d < dims; ++d) text += (d ? ", " : "") + std::to_string(tensor.size(d));
  return text + "]";
}

Number number_type(const Tensor& tensor, const char* name) {
  check(on_gpu(tensor), std::string(name) + ": expected a CUDA tensor");
  const ScalarType type = tensor.scalar_type();
  check(type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16,
        std::string(name) + ": expected float32, float16 or bfloat16");
  return type == ScalarType::Float ? Number::kFloat32 : type == ScalarType::Half ? Number::kFloat16 : Number::kBFloat16;
}

void check_device(const Tensor& tensor, const char* name, const Tensor& like) {
  check(on_gpu(tensor) && tensor.get_device_index() == like.get_device_index(),
        std::string(name) + ": expected a tensor on cuda:" + std::to_string(like.get_device_index()));
}

bool same_tokens(const Tensor& tensor, const FeatureTensor& features) {
  bool same = true;
  for (int64_t d = 0; same && d < features.token_dims(); ++d) same = tensor.size(d) == features.tensor().size(d);
  return same;
}

}  // namespace

FeatureTensor::FeatureTensor(const Tensor& features) : tensor_(features), type_(number_type(features, "features")) {
  check(features.dim() == 2 || features.dim() == 3,
        "features: expected [N, D] or [B, N, D], got " + shape_text(features, features.dim()));
  const int64_t last = features.dim() - 1;
  check(features.size(last) <= INT32_MAX, "features: more than 2^31 - 1 columns");
  if (features.stride(last) != 1 && features.size(last) > 1) tensor_ = torch::stable::contiguous(features);
}

Rows FeatureTensor::rows(bool packed) const {
  const int64_t dims = tensor_.dim();
  return {tensor_.const_data_ptr(), dims == 3 ? tensor_.stride(0) : 0, tensor_.stride(dims - 2),
          int(tensor_.size(dims - 1)), packed};
}

ScoreTensor::ScoreTensor(const Tensor& scores, const char* name) : tensor_(scores), type_(number_type(scores, name)) {
  check(scores.dim() == 1 || scores.dim() == 2,
        std::string(name) + ": expected [N] or [B, N], got " + shape_text(scores, scores.dim()));
}

ScoreTensor::ScoreTensor(const Tensor& scores, const char* name, const FeatureTensor& features)
    : ScoreTensor(scores, name) {
  check_device(scores, name, features.tensor());
  check(scores.dim() == features.token_dims() && same_tokens(scores, features),
        std::string(name) + ": expected " + shape_text(features.tensor(), features.token_dims()) + ", got " +
            shape_text(scores, scores.dim()));
}

Scores ScoreTensor::scores(bool packed) const {
  const int64_t dims = tensor_.dim();
  return {tensor_.const_data_ptr(), dims == 2 ? tensor_.stride(0) : 0, tensor_.stride(dims - 1), type_, packed};
}

SegmentTensors::SegmentTensors(const Tensor& tokens, int64_t token_dims, const char* name,
                               const std::vector<int64_t>& k, const std::optional<Tensor>& cu_seqlens)
    : tokens_(tokens) {
  check(token_dims == 1 || (token_dims == 2 && !cu_seqlens),
        std::string(name) +
            (cu_seqlens ? ": expected packed tokens [T, ...] with cu_seqlens, got "
                        : ": expected [N, ...] or [B, N, ...], got ") +
            shape_text(tokens, tokens.dim()));
  const int64_t items = token_dims == 2 ? tokens.size(0) : 1, n = tokens.size(token_dims - 1);
  check(items * n <= INT32_MAX, std::string(name) + ": more than 2^31 - 1 tokens");
  int64_t total = 0, most = 0;
  for (size_t s = 0; s < k.size(); ++s) {
    check(k[s] >= 0, "k=" + std::to_string(k[s]) + " is negative");
    check(k[s] <= n,
          "k=" + std::to_string(k[s]) + " exceeds N=" + std::to_string(n) + " in segment " + std::to_string(s));
    total += k[s];
    most = std::max(most, k[s]);
  }
  if (cu_seqlens) {
    check_device(*cu_seqlens, "cu_seqlens", tokens);
    check(cu_seqlens->dim() == 1 && cu_seqlens->scalar_type() == ScalarType::Int && cu_seqlens->size(0) >= 1,
          "cu_seqlens: expected int32 [B + 1]");
    check(int64_t(k.size()) + 1 == cu_seqlens->size(0), "k: expected one entry a segment, " +
                                                            std::to_string(cu_seqlens->size(0) - 1) + ", got " +
                                                            std::to_string(k.size()));
    check(total <= n, "k: segments of " + std::to_string(n) + " tokens cannot give " + std::to_string(total));
    cu_seqlens_ = torch::stable::contiguous(*cu_seqlens);
    all_.cu_seqlens = cu_seqlens_->const_data_ptr<int32_t>();
    all_.count = int(k.size());
    shape_ = {total};
    if (std::any_of(k.begin(), k.end(), [&](int64_t other) { return other != most; })) {
      host_starts_.push_back(0);
      for (const int64_t own : k) host_starts_.push_back(host_starts_.back() + int32_t(own));
    }
  } else {
    check(k.size() == 1, "k: expected one entry without cu_seqlens, got " + std::to_string(k.size()));
    all_.count = int(items);
    total = items * k[0];
    if (token_dims == 2) shape_.push_back(items);
    shape_.push_back(k[0]);
  }
  all_.tokens = int(n);
  all_.k = int(most);
  all_.total_k = int(total);
}

Tensor SegmentTensors::new_result() const { return torch::stable::new_empty(tokens_, shape_, ScalarType::Long); }

Segments SegmentTensors::on(CudaStream& stream) {
  if (!host_starts_.empty() && !starts_) {
    starts_ = device_ints(stream, host_starts_, tokens_);
    all_.starts = starts_->const_data_ptr<int32_t>();
  }
  return all_;
}

Tensor check_positions(const Tensor& positions, const FeatureTensor& features) {
  check_device(positions, "positions", features.tensor());
  const int64_t dims = features.token_dims() + 1;
  check(positions.scalar_type() == ScalarType::Int && positions.dim() == dims && positions.size(dims - 1) == 3 &&
            same_tokens(positions, features),
        "positions: expected int32 with one (t, y, x) a token of features");
  return torch::stable::contiguous(positions);
}

Tensor device_ints(CudaStream& stream, const std::vector<int32_t>& values, const Tensor& like) {
  Tensor out = torch::stable::new_empty(like, {int64_t(values.size())}, ScalarType::Int);
  host_ints(stream, values, out.mutable_data_ptr<int32_t>());
  return out;
}

int block_size(int64_t block) {
  check(block >= 0 && block <= INT32_MAX, "block: expected 0 (automatic) or more, got " + std::to_string(block));
  return int(block);
}

}  // namespace flashprune::gpu
