// device_facts: one trivial kernel that asks the device what it is. It shows that the CUDA library launches on the card
// at hand, which of its embedded images ran there, and the limits that the selection kernels size themselves by.
// Costs one launch of one thread; no synchronisation.

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace {

// The order of python/flashprune/native.py, DEVICE_FACTS.
struct Facts {
  int64_t compiled_for;     // of the image that runs, 10 × major + minor: 90 on Hopper
  int64_t device;           // the card's own compute capability, likewise
  int64_t multiprocessors;  // count
  int64_t shared_memory;    // bytes that one thread block may ask for
  int64_t l2_cache;         // bytes
  int64_t driver;           // the CUDA version that the driver supports, 1000 × major + 10 × minor
};
constexpr int64_t kFacts = sizeof(Facts) / sizeof(int64_t);

__global__ void device_facts_kernel(Facts facts, int64_t* __restrict__ out) {
#ifdef __CUDA_ARCH__
  facts.compiled_for = __CUDA_ARCH__ / 10;
#endif
  *reinterpret_cast<Facts*>(out) = facts;
}

int64_t attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, device));
  return value;
}

// The newest CUDA that the driver supports, 0 without a driver, and the CUDA of the runtime that is linked into this
// library; 13000 for 13.0. Both can be asked whatever the driver is, unlike anything else of the runtime.
int64_t driver_version() {
  int version = 0;
  STD_CUDA_CHECK(cudaDriverGetVersion(&version));
  return version;
}

int64_t runtime_version() {
  int version = 0;
  STD_CUDA_CHECK(cudaRuntimeGetVersion(&version));
  return version;
}

// like: any CUDA tensor → int64 [kFacts] on its device.
torch::stable::Tensor device_facts(const torch::stable::Tensor& like) {
  STD_TORCH_CHECK(like.is_cuda(), "like must be a CUDA tensor");
  const int device = like.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));

  Facts facts{};
  facts.device =
      10 * attribute(cudaDevAttrComputeCapabilityMajor, device) + attribute(cudaDevAttrComputeCapabilityMinor, device);
  facts.multiprocessors = attribute(cudaDevAttrMultiProcessorCount, device);
  facts.shared_memory = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  facts.l2_cache = attribute(cudaDevAttrL2CacheSize, device);
  facts.driver = driver_version();

  auto out = torch::stable::new_empty(like, {kFacts}, torch::headeronly::ScalarType::Long);
  device_facts_kernel<<<1, 1, 0, static_cast<cudaStream_t>(stream)>>>(facts, out.mutable_data_ptr<int64_t>());
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

}  // namespace

// The schemas outside csrc/library.cpp: these operators exist only where the CUDA library does.
STABLE_TORCH_LIBRARY_FRAGMENT(flashprune, m) {
  m.def("device_facts(Tensor like) -> Tensor");
  m.def("driver_version() -> int");
  m.def("runtime_version() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(flashprune, CUDA, m) { m.impl("device_facts", TORCH_BOX(&device_facts)); }

STABLE_TORCH_LIBRARY_IMPL(flashprune, CompositeExplicitAutograd, m) {
  m.impl("driver_version", TORCH_BOX(&driver_version));
  m.impl("runtime_version", TORCH_BOX(&runtime_version));
}
