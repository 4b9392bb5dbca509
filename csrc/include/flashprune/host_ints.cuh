// Ints that the host knows, on the device: no synchronisation, and a CUDA graph may record it. A copy from host memory
// would be neither: unless the memory is pinned it waits, and a graph copies whatever that memory holds when it is
// replayed. Arguments of a kernel are stored in the graph.
#pragma once

#include <algorithm>
#include <vector>

#include "flashprune/launch.cuh"

namespace flashprune::gpu {

inline constexpr int kHostInts = 512;  // of a launch; a kernel's arguments may take 4 KB

template <int kCount>
struct HostInts {
  int32_t values[kCount];
};

template <int kCount>
__global__ void host_ints_kernel(const __grid_constant__ HostInts<kCount> ints, int count, int32_t* out) {
  for (int i = int(threadIdx.x); i < count; i += int(blockDim.x)) out[i] = ints.values[i];
}

// out: [values.size()] on the device.
template <class Stream>
void host_ints(Stream& stream, const std::vector<int32_t>& values, int32_t* out) {
  for (size_t from = 0; from < values.size(); from += kHostInts) {
    HostInts<kHostInts> ints{};
    const size_t count = std::min<size_t>(kHostInts, values.size() - from);
    std::copy_n(values.data() + from, count, ints.values);
    stream.launch(host_ints_kernel<kHostInts>, Shape{dim3{1, 1, 1}, 128}, ints, int(count), out + from);
  }
}

}  // namespace flashprune::gpu
