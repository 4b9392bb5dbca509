// Tests of the emulation itself, not of the product: small kernels whose results are known, and mutants of them, each
// with one mistake that the emulation must show.
#include <array>
#include <map>

#include "emulation/module.h"
#include "flashprune/block.cuh"

namespace flashprune::emulation {
namespace {

using namespace gpu;

// ---- what the intrinsics give

constexpr const char* kResults[] = {"shfl",       "shfl_8",  "xor",      "xor_8",     "up",        "down",
                                    "ballot",     "any",     "all",      "match",     "max",       "min",
                                    "add",        "max_u",   "and_u",    "or_u",      "xor_u",     "odd_lanes",
                                    "sync_count", "sync_or", "sync_and", "block_max", "block_sum", "before"};

__global__ void intrinsics_kernel(const int* in, int* out) {
  const int t = int(threadIdx.x), lane = t % 32, x = in[t];
  const unsigned u = unsigned(x);
  int row = 0;
  const auto put = [&](auto value) { out[row++ * int(blockDim.x) + t] = int(value); };
  put(__shfl_sync(kAllLanes, x, lane * 7 % 32));
  put(__shfl_sync(kAllLanes, x, 3, 8));
  put(__shfl_xor_sync(kAllLanes, x, 5));
  put(__shfl_xor_sync(kAllLanes, x, 12, 8));
  put(__shfl_up_sync(kAllLanes, x, 3u));
  put(__shfl_down_sync(kAllLanes, x, 3u, 16));
  put(__ballot_sync(kAllLanes, x & 1));
  put(__any_sync(kAllLanes, x == in[5]));
  put(__all_sync(kAllLanes, x != in[5]));
  put(__match_any_sync(kAllLanes, x % 5));
  put(__reduce_max_sync(kAllLanes, x));
  put(__reduce_min_sync(kAllLanes, x));
  put(__reduce_add_sync(kAllLanes, x));
  put(__reduce_max_sync(kAllLanes, u));
  put(__reduce_and_sync(kAllLanes, u));
  put(__reduce_or_sync(kAllLanes, u));
  put(__reduce_xor_sync(kAllLanes, u));
  put(lane % 2 ? __reduce_add_sync(0xaaaaaaaau, x) : 0);
  put(__syncthreads_count(x & 1));
  put(__syncthreads_or(x == in[5]));
  put(__syncthreads_and(x != in[5]));
  int* const scratch = reinterpret_cast<int*>(shared_memory());
  put(key_index(block_max(make_key(float(x), t), reinterpret_cast<Key*>(scratch))));
  int total = 0;
  const int before = block_exclusive_sum(x, total, scratch);
  put(total);
  put(before);
}

py::dict intrinsics(const Ints& values, uint64_t seed) {
  const py::ssize_t n = values.size();
  py::array_t<int> out({py::ssize_t(std::size(kResults)), n});
  Stream(seed, 1).launch(intrinsics_kernel, {{1}, int(n), kMostWarps * sizeof(Key)}, values.data(), out.mutable_data());
  py::dict all;
  for (size_t i = 0; i < std::size(kResults); ++i) all[kResults[i]] = out[py::int_(i)];
  return all;
}

// places: what each thread got of atomicAdd; memory: sum, maximum, minimum, and, or, exchanged, compared and swapped.
__global__ void atomics_kernel(int* places, int* memory) {
  const int id = int(blockIdx.x * blockDim.x + threadIdx.x);
  places[id] = atomicAdd(&memory[0], 1);
  atomicMax(&memory[1], id);
  atomicMin(&memory[2], id);
  atomicAnd(&memory[3], ~(1 << id % 8));
  atomicOr(&memory[4], 1 << id % 8);
  memory[7 + id] = atomicExch(&memory[5], id);
  for (int seen = memory[6];;) {  // adds 2
    const int before = atomicCAS(&memory[6], seen, seen + 2);
    if (before == seen) break;
    seen = before;
  }
}

py::tuple atomics(int blocks, int threads, uint64_t seed) {
  py::array_t<int> places(blocks * threads), memory(7 + blocks * threads);
  std::fill_n(memory.mutable_data(), memory.size(), 0);
  memory.mutable_at(3) = memory.mutable_at(5) = -1;
  Stream(seed, 2).launch(atomics_kernel, {{unsigned(blocks)}, threads}, places.mutable_data(), memory.mutable_data());
  return py::make_tuple(places, memory);
}

// a: [16, depth], b: [8, depth], depth 16 (float: 8) -> d [16, 8] + a bᵀ, the fragments loaded by hand, or as matrices.
template <class T>
__global__ void matrix_kernel(const T* a, const T* b, bool as_matrices, float* d) {
  const int lane = int(threadIdx.x), g = lane / 4, t = lane % 4;
  constexpr int kDepth = 32 / int(sizeof(T));
  T* const shared = reinterpret_cast<T*>(shared_memory());
  for (int i = lane; i < 24 * kDepth; i += 32) shared[i] = i < 16 * kDepth ? a[i] : b[i - 16 * kDepth];
  __syncwarp();
  uint32_t of_a[4], of_b[4];
  if (as_matrices) {
    load_matrices(of_a, shared + lane % 16 * kDepth + lane / 16 * (kDepth / 2));
    load_matrices(of_b, shared + (16 + lane % 8) * kDepth + lane / 8 % 2 * (kDepth / 2));
  } else {
    const auto word = [&](const T* row, int part) {
      uint32_t bits;
      std::memcpy(&bits, row + part * (kDepth / 2) + t * (4 / sizeof(T)), 4);
      return bits;
    };
    for (int r = 0; r < 4; ++r) of_a[r] = word(a + (g + r % 2 * 8) * kDepth, r / 2);
    for (int r = 0; r < 2; ++r) of_b[r] = word(b + g * kDepth, r);
  }
  float sums[4];
  for (int e = 0; e < 4; ++e) sums[e] = d[(g + e / 2 * 8) * 8 + 2 * t + e % 2];
  const uint32_t pairs[2] = {of_b[0], of_b[1]};
  mma<T>(sums, of_a, pairs);
  for (int e = 0; e < 4; ++e) d[(g + e / 2 * 8) * 8 + 2 * t + e % 2] = sums[e];
}

py::array_t<float> matrix_product(const Numbers& a, const Numbers& b, bool as_matrices, uint64_t seed) {
  py::array_t<float> d({16, 8});
  std::fill_n(d.mutable_data(), d.size(), 1.0f);
  with_type(a, [&]<class T>(T) {
    Stream(seed, 1).launch(matrix_kernel<T>, {{1}, 32, 24 * 32}, static_cast<const T*>(a.data()),
                           static_cast<const T*>(b.data()), as_matrices, d.mutable_data());
  });
  return d;
}

py::array_t<float> floats(const Numbers& numbers) {
  py::array_t<float> out(numbers.size());
  with_type(numbers, [&]<class T>(T) {
    for (py::ssize_t i = 0; i < numbers.size(); ++i)
      out.mutable_at(i) = to_float(static_cast<const T*>(numbers.data())[i]);
  });
  return out;
}

// ---- right kernels and mutants of them that give a wrong result. All know of a token the value of another one that a
// permutation names; kMutant leaves out, or moves, what makes them right.

constexpr int kThreads = 128, kBlocks = 3;
constexpr int kTokens = kThreads * kBlocks;

struct Work {
  const int* in;      // [kTokens]
  int* out;           // [kTokens]
  int* workspace;     // [kTokens], noise
  uint32_t* counter;  // 0
};

__device__ int* ints() { return reinterpret_cast<int*>(shared_memory()); }

__device__ void grid_barrier(uint32_t* counter, uint32_t arrivals, FLASHPRUNE_WHERE) {
  __syncthreads(where);
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(counter, 1u);
    while (load_acquire(counter) < arrivals) spin(where);
  }
  __syncthreads(where);
}

// Reverses each block's values. Mutant: reads before all have written.
template <bool kMutant>
__global__ void block_reverse(Work w) {
  const int t = int(threadIdx.x), token = int(blockIdx.x) * kThreads + t;
  ints()[t] = w.in[token];
  if (!kMutant) __syncthreads();
  w.out[token] = ints()[kThreads - 1 - t];
}

// The same, a step of the way at a time. Mutant: writes the next round's values before all have read this one's.
template <bool kMutant>
__global__ void block_reverse_in_rounds(Work w) {
  const int t = int(threadIdx.x), token = int(blockIdx.x) * kThreads + t;
  int value = w.in[token];
  for (int distance = kThreads / 2; distance > 0; distance /= 2) {
    ints()[t] = value;
    __syncthreads();
    value = ints()[t ^ distance];
    if (!kMutant) __syncthreads();
  }
  w.out[token] = value;
}

// The same within each warp. Mutant: takes the lanes of a warp for synchronous.
template <bool kMutant>
__global__ void warp_reverse(Work w) {
  const int t = int(threadIdx.x), token = int(blockIdx.x) * kThreads + t;
  ints()[t] = w.in[token];
  if (!kMutant) __syncwarp();
  w.out[token] = ints()[t ^ 31];
}

// The same over all blocks, cooperatively. Mutant: no barrier between the blocks.
template <bool kMutant>
__global__ void grid_reverse(Work w) {
  const int token = int(blockIdx.x * kThreads + threadIdx.x);
  w.workspace[token] = w.in[token];
  if (!kMutant) grid_barrier(w.counter, kBlocks);
  w.out[token] = w.workspace[kTokens - 1 - token];
}

// The last block to come reverses the values of all. Mutant: counts itself before it has written.
template <bool kMutant>
__global__ void last_block_reverse(Work w) {
  const int t = int(threadIdx.x), token = int(blockIdx.x) * kThreads + t;
  if (!kMutant) w.workspace[token] = w.in[token];
  __threadfence();
  __syncthreads();
  if (t == 0) ints()[0] = atomicAdd(w.counter, 1u) == kBlocks - 1;
  if (kMutant) w.workspace[token] = w.in[token];
  __syncthreads();
  if (!ints()[0]) return;
  for (int i = t; i < kTokens; i += kThreads) w.out[i] = w.workspace[kTokens - 1 - i];
}

// Reverses each block's values by way of global memory. Mutant: all blocks use the same.
template <bool kMutant>
__global__ void workspace_reverse(Work w) {
  const int t = int(threadIdx.x), token = int(blockIdx.x) * kThreads + t;
  int* const own = w.workspace + (kMutant ? 0 : blockIdx.x * kThreads);
  own[t] = w.in[token];
  __syncthreads();
  w.out[token] = own[kThreads - 1 - t];
}

// Reverses each block's values, copied asynchronously. Mutant: waits for the wrong group.
template <bool kMutant>
__global__ void copied_reverse(Work w) {
  const int t = int(threadIdx.x), token = int(blockIdx.x) * kThreads + t;
  if (t < kThreads / 4) copy_async_16(ints() + 4 * t, w.in + blockIdx.x * kThreads + 4 * t);
  copy_async_commit();
  if (t < kThreads / 4) copy_async_16(ints() + kThreads + 4 * t, nullptr);
  copy_async_commit();
  copy_async_wait<kMutant ? 2 : 1>();
  __syncthreads();
  const int value = ints()[kThreads - 1 - t];
  copy_async_wait<0>();
  __syncthreads();
  w.out[token] = value + ints()[kThreads + t];  // 0
}

// Counts in shared memory. Mutant: takes it for zeroed.
template <bool kMutant>
__global__ void counted_reverse(Work w) {
  const int t = int(threadIdx.x), token = int(blockIdx.x) * kThreads + t;
  if (!kMutant) ints()[t] = 0;
  __syncthreads();
  atomicAdd(&ints()[kThreads - 1 - t], w.in[token]);
  __syncthreads();
  w.out[token] = ints()[t];
}

// ---- mutants that stop with an error. The tests look for the line that each error names: that with its name.

__global__ void barrier_in_a_branch(Work) {
  if (threadIdx.x < 32) __syncthreads();  // barrier_in_a_branch
}

__global__ void barriers_at_two_places(Work) {
  if (threadIdx.x < 32) {
    __syncthreads();  // barriers_at_two_places
  } else {
    __syncthreads();  // barriers_at_two_places
  }
}

__global__ void lanes_that_have_ended(Work w) {
  if (threadIdx.x % 32 < 16) w.out[threadIdx.x] = __shfl_sync(kAllLanes, 1, 0);  // lanes_that_have_ended
}

__global__ void mask_without_its_caller(Work w) {
  w.out[threadIdx.x] = int(__ballot_sync(0xffffu, 1));  // mask_without_its_caller
}

__global__ void collectives_at_two_places(Work w) {
  if (threadIdx.x % 2) {
    w.out[threadIdx.x] = __shfl_sync(kAllLanes, 1, 0);  // collectives_at_two_places
  } else {
    w.out[threadIdx.x] = __any_sync(kAllLanes, 1);  // collectives_at_two_places
  }
}

__global__ void different_masks(Work w) {
  const unsigned mask = threadIdx.x % 32 ? kAllLanes : 0x7fffffffu;
  w.out[threadIdx.x] = __any_sync(mask, 1);  // different_masks
}

__global__ void barrier_against_collective(Work) {
  if (threadIdx.x % 32 == 7) {
    __syncthreads();  // barrier_against_collective
  } else {
    __syncwarp();
  }
  __syncthreads();
}

__global__ void one_block_too_few(Work w) {
  grid_barrier(w.counter, kBlocks + 1);  // one_block_too_few
}

__global__ void blocks_that_are_not_alive(Work w) {
  grid_barrier(w.counter, gridDim.x);  // blocks_that_are_not_alive
}

__global__ void copy_to_global_memory(Work w) {
  copy_async_16(w.workspace, w.in);  // copy_to_global_memory
}

__global__ void copy_past_the_end(Work w) {
  copy_async_16(ints() + 2 * kThreads, w.in);  // copy_past_the_end
}

__global__ void copy_off_alignment(Work w) {
  copy_async_16(ints() + 1, w.in);  // copy_off_alignment
}

// Errors of AddressSanitizer.
__global__ void past_the_end_of_shared_memory(Work w) {
  w.out[threadIdx.x] = ints()[2 * kThreads + threadIdx.x / 64];  // past_the_end_of_shared_memory
}

__global__ void past_the_end_of_a_workspace(Work w) {
  w.workspace[kTokens + threadIdx.x / 127] = 1;  // past_the_end_of_a_workspace
}

__global__ void past_the_end_of_an_array(Work w) {
  int own[4] = {1, 2, 3, 4};
  __syncwarp();
  for (int i = 0; i < int(w.counter[0]) + 5; ++i) w.out[threadIdx.x] += own[i];  // past_the_end_of_an_array
}

__global__ void nothing(Work) {}

struct Kernel {
  void (*run)(Work);
  bool cooperative = false;
  int resident = kBlocks;  // blocks that the device holds at once
};
const std::map<std::string, Kernel> kRight = {
    {"block_reverse", {block_reverse<false>}},
    {"block_reverse_in_rounds", {block_reverse_in_rounds<false>}},
    {"warp_reverse", {warp_reverse<false>}},
    {"grid_reverse", {grid_reverse<false>, true}},
    {"last_block_reverse", {last_block_reverse<false>}},
    {"workspace_reverse", {workspace_reverse<false>}},
    {"copied_reverse", {copied_reverse<false>}},
    {"counted_reverse", {counted_reverse<false>}},
};
const std::map<std::string, Kernel> kMutants = {
    {"block_reverse", {block_reverse<true>}},
    {"block_reverse_in_rounds", {block_reverse_in_rounds<true>}},
    {"warp_reverse", {warp_reverse<true>}},
    {"grid_reverse", {grid_reverse<true>, true}},
    {"last_block_reverse", {last_block_reverse<true>}},
    {"workspace_reverse", {workspace_reverse<true>}},
    {"copied_reverse", {copied_reverse<true>}},
    {"counted_reverse", {counted_reverse<true>}},

    {"barrier_in_a_branch", {barrier_in_a_branch}},
    {"barriers_at_two_places", {barriers_at_two_places}},
    {"lanes_that_have_ended", {lanes_that_have_ended}},
    {"mask_without_its_caller", {mask_without_its_caller}},
    {"collectives_at_two_places", {collectives_at_two_places}},
    {"different_masks", {different_masks}},
    {"barrier_against_collective", {barrier_against_collective}},
    {"one_block_too_few", {one_block_too_few, true}},
    {"blocks_that_are_not_alive", {blocks_that_are_not_alive, false, kBlocks - 1}},
    {"copy_to_global_memory", {copy_to_global_memory}},
    {"copy_past_the_end", {copy_past_the_end}},
    {"copy_off_alignment", {copy_off_alignment}},

    {"past_the_end_of_shared_memory", {past_the_end_of_shared_memory}},
    {"past_the_end_of_a_workspace", {past_the_end_of_a_workspace}},
    {"past_the_end_of_an_array", {past_the_end_of_an_array}},
};

// values: one for each of kTokens.
py::array_t<int> run(const Kernel& kernel, const Ints& values, uint64_t seed) {
  if (values.size() != kTokens) throw std::invalid_argument("values: expected " + std::to_string(kTokens));
  py::array_t<int> out(kTokens);
  std::fill_n(out.mutable_data(), kTokens, -1);
  const std::unique_ptr<int[]> workspace(new int[kTokens]);
  std::fill_n(workspace.get(), kTokens, -2);
  uint32_t counter = 0;
  const Shape shape{{kBlocks}, kThreads, 2 * kThreads * sizeof(int), kernel.cooperative};
  Stream(seed, kernel.resident)
      .launch(kernel.run, shape, Work{values.data(), out.mutable_data(), workspace.get(), &counter});
  return out;
}

const Binding binding([](py::module_& parent) {
  py::module_ m = parent.def_submodule("mutants", "Kernels that test the emulation.");
  m.def("intrinsics", &intrinsics, py::arg("values"), py::arg("seed"));
  m.def("atomics", &atomics, py::arg("blocks"), py::arg("threads"), py::arg("seed"));
  m.def("matrix_product", &matrix_product, py::arg("a"), py::arg("b"), py::arg("as_matrices"), py::arg("seed"));
  m.def("floats", &floats, py::arg("numbers"));
  m.def("right",
        [](const std::string& name, const Ints& values, uint64_t seed) { return run(kRight.at(name), values, seed); });
  m.def("mutant", [](const std::string& name, const Ints& values, uint64_t seed) {
    return run(kMutants.at(name), values, seed);
  });
  m.def("launch", [](std::array<unsigned, 3> grid, int threads, size_t shared_bytes, bool cooperative, int resident) {
    Stream(0, resident).launch(nothing, {{grid[0], grid[1], grid[2]}, threads, shared_bytes, cooperative}, Work{});
  });
});

}  // namespace
}  // namespace flashprune::emulation
