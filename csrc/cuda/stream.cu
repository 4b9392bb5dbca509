#include "stream.h"

#include <torch/csrc/stable/macros.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>

namespace flashprune::gpu {
namespace {

constexpr size_t kAlwaysShared = 48 << 10;  // bytes a block that no attribute has to allow

struct Device {
  int multiprocessors = 0, shared_limit = 0;
};

// What was asked or told once: each question costs the host microseconds, and a process asks few different ones.
std::mutex mutex;
std::map<int, Device> devices;
std::map<std::pair<int, const void*>, size_t> allowed;  // (device, kernel) -> bytes of shared memory
std::map<std::tuple<int, const void*, int, size_t>, int> resident;

}  // namespace

CudaStream::CudaStream(const char* op, const torch::stable::Tensor& on)
    : op_(op), device_(on.get_device_index()), guard_(device_) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
  stream_ = static_cast<cudaStream_t>(stream);
  const std::lock_guard lock(mutex);
  Device& device = devices[device_];
  if (device.multiprocessors == 0) {
    Device found;
    const char* const what = "reading the device's limits";
    check(cudaDeviceGetAttribute(&found.shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device_), what);
    check(cudaDeviceGetAttribute(&found.multiprocessors, cudaDevAttrMultiProcessorCount, device_), what);
    device = found;
  }
  multiprocessors_ = device.multiprocessors;
  shared_limit_ = size_t(device.shared_limit);
}

void CudaStream::check(cudaError_t error, const char* what) const {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // so that the next check of anybody does not report this one
  throw std::runtime_error(std::string(op_) + ": " + what + ": " + cudaGetErrorString(error));
}

void CudaStream::allow_shared(const void* kernel, size_t bytes) {
  if (bytes <= kAlwaysShared) return;
  const std::lock_guard lock(mutex);
  size_t& most = allowed[{device_, kernel}];
  if (bytes <= most) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)),
        "asking for shared memory");
  most = bytes;
}

void CudaStream::launch(const void* kernel, const Shape& shape, void** arguments) {
  allow_shared(kernel, shape.shared_bytes);
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = dim3(unsigned(shape.threads));
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream_;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  config.attrs = &attribute;
  config.numAttrs = shape.cooperative ? 1 : 0;
  check(cudaLaunchKernelExC(&config, kernel, arguments), "launching a kernel");
}

int CudaStream::resident_blocks(const void* kernel, int threads, size_t shared_bytes) {
  allow_shared(kernel, shared_bytes);
  const std::lock_guard lock(mutex);
  const auto [at, is_new] = resident.try_emplace({device_, kernel, threads, shared_bytes}, 0);
  if (is_new) {
    int blocks = 0;
    const cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared_bytes);
    if (error != cudaSuccess) resident.erase(at);
    check(error, "asking for occupancy");
    at->second = blocks * multiprocessors_;
  }
  return at->second;
}

void CudaStream::zero(void* memory, size_t bytes) {
  if (bytes > 0) check(cudaMemsetAsync(memory, 0, bytes, stream_), "zeroing memory");
}

}  // namespace flashprune::gpu
