// The scratch memory of the calling thread's operators: new for each call, or a buffer that the caller keeps. Its size
// follows from host integers and the device, so that one call tells what all calls of its shapes need.
#include <algorithm>

#include "tensors.h"

namespace flashprune::gpu {

namespace {

using torch::headeronly::ScalarType;

constexpr size_t kAlignment = 16;  // that the kernels rely on

struct Workspace {
  std::optional<Tensor> buffer;
  size_t most = 0;  // asked for since the buffer was named
};

Workspace& workspace() {
  thread_local Workspace own;
  return own;
}

}  // namespace

Tensor new_workspace(const Tensor& like, size_t bytes) {
  Workspace& own = workspace();
  own.most = std::max(own.most, bytes);
  if (!own.buffer) return torch::stable::new_empty(like, {int64_t(bytes)}, ScalarType::Byte);
  check(own.buffer->get_device_index() == like.get_device_index(),
        "workspace: expected a buffer on cuda:" + std::to_string(like.get_device_index()));
  check(size_t(own.buffer->numel()) >= bytes,
        "workspace: expected at least " + std::to_string(bytes) + " bytes, got " + std::to_string(own.buffer->numel()));
  return *own.buffer;
}

// An empty buffer ends its use.
void use_workspace(const Tensor& buffer) {
  check(on_gpu(buffer) && buffer.scalar_type() == ScalarType::Byte && buffer.dim() == 1 &&
            (buffer.numel() <= 1 || buffer.stride(0) == 1),
        "workspace: expected a contiguous uint8 [bytes] on a CUDA device");
  check(reinterpret_cast<uintptr_t>(buffer.const_data_ptr()) % kAlignment == 0,
        "workspace: expected an address that is a multiple of " + std::to_string(kAlignment));
  workspace() = {buffer.numel() > 0 ? std::optional<Tensor>(buffer) : std::nullopt, 0};
}

int64_t workspace_bytes(const Tensor&) { return int64_t(workspace().most); }

}  // namespace flashprune::gpu

STABLE_TORCH_LIBRARY_IMPL(flashprune, CUDA, m) {
  m.impl("use_workspace", TORCH_BOX(&flashprune::gpu::use_workspace));
  m.impl("workspace_bytes", TORCH_BOX(&flashprune::gpu::workspace_bytes));
}
