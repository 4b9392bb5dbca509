// The CUDA of include/flashprune/cuda.cuh on a CPU, for testing the kernels where there is no GPU. A test tool: slow,
// and not part of a wheel.
//
// Each thread of a block is a fiber. A fiber runs until it has to wait (barrier, warp collective, spin); which one runs
// next is drawn by a seed, so a barrier that is missing shows as a wrong result under some seed. Blocks run one after
// another in a random order, or in a cooperative launch all at once. What a GPU would turn into a hang or silent
// corruption is an error here:
//   a barrier that only part of a block reaches, or that parts reach at different places in the code
//   a warp collective whose mask names absent lanes, or that lanes reach at different places
//   a spin that nothing will ever end
// Shared memory starts as noise that differs by seed, and asynchronous copies land only when they are waited for.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <source_location>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

namespace flashprune::emulation {

using Where = std::source_location;

inline std::string text(const Where& where) {
  std::string file = where.file_name();
  return file.substr(file.find_last_of('/') + 1) + ":" + std::to_string(where.line());
}

inline bool same(const Where& a, const Where& b) {
  return a.line() == b.line() && a.column() == b.column() && std::strcmp(a.file_name(), b.file_name()) == 0;
}

enum class State { kReady, kBarrier, kCollective, kDone };

struct Block;

struct Copy {
  void* to;
  const void* from;  // null: zeros
  size_t bytes;
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Block* block = nullptr;
  unsigned index = 0;
  State state = State::kReady;
  Where where;        // of what it waits for
  uint32_t mask = 0;  // lanes of the collective that it waits for
  const void* operation = nullptr;
  void* payload = nullptr;
  int vote = 0;  // what it brought to a barrier
  std::vector<Copy> open;
  std::vector<std::vector<Copy>> groups;
};

struct Block {
  unsigned index = 0;
  std::vector<Thread> threads;
  unsigned waiting = 0;  // threads at the barrier
  int votes = 0;         // of the last complete barrier
  int all = 0;
  std::unique_ptr<unsigned char[]> memory;
  unsigned char* shared = nullptr;
};

struct Launch {
  dim3 grid, block;
  size_t shared_bytes = 0;
  bool cooperative = false;
  uint64_t seed = 0;
};

#if defined(__SANITIZE_ADDRESS__)
inline constexpr size_t kStack = 512 << 10;
#else
inline constexpr size_t kStack = 96 << 10;
#endif
inline constexpr size_t kShared = 128;           // alignment
inline constexpr uint64_t kPatience = 1u << 16;  // turns of all threads with nothing but spinning

class Machine {
 public:
  Machine(const Launch& launch, std::function<void()> kernel)
      : launch_(launch), kernel_(std::move(kernel)), random_(launch.seed) {}

  void run() {
    Machine* const outer = current_;
    current_ = this;
    const unsigned blocks = launch_.grid.x * launch_.grid.y * launch_.grid.z;
    std::vector<unsigned> order(blocks);
    for (unsigned b = 0; b < blocks; ++b) order[b] = b;
    std::shuffle(order.begin(), order.end(), random_);
    const size_t together = launch_.cooperative ? blocks : 1;
    for (size_t first = 0; first < blocks && error_.empty(); first += together) {
      run_blocks(
          {order.begin() + ptrdiff_t(first), order.begin() + ptrdiff_t(std::min<size_t>(blocks, first + together))});
    }
    current_ = outer;
    if (!error_.empty()) throw std::runtime_error(error_);
  }

  static Machine& current() { return *current_; }
  Thread& thread() { return *running_; }
  const Launch& launch() const { return launch_; }
  dim3 block_index() const {
    const unsigned b = running_->block->index;
    return {b % launch_.grid.x, b / launch_.grid.x % launch_.grid.y, b / (launch_.grid.x * launch_.grid.y)};
  }

  // Returns once all threads of the block are here: how many brought a vote, and whether all did.
  void barrier(int vote, const Where& where) {
    Thread& me = *running_;
    Block& block = *me.block;
    for (const Thread& other : block.threads) {
      if (other.state == State::kDone)
        fail(me, "__syncthreads at " + text(where) + " after thread " + name(other) + " has ended");
      if (other.state == State::kBarrier && !same(other.where, where)) {
        fail(me, "__syncthreads at " + text(where) + " while thread " + name(other) + " is at that of " +
                     text(other.where));
      }
    }
    me.vote = vote;
    if (++block.waiting < block.threads.size()) {
      wait(State::kBarrier, where);
      return;
    }
    block.waiting = 0;
    block.votes = 0;
    for (Thread& other : block.threads) {
      block.votes += other.vote != 0;
      if (&other != &me) release(other);
    }
    yield();  // the last to come is not always the first to go on
  }

  // Returns once all lanes of the mask are here and complete(lanes' payloads, mask) has run.
  void collective(uint32_t mask, const void* operation, void* payload, const Where& where,
                  const std::function<void(void* const*, uint32_t)>& complete) {
    Thread& me = *running_;
    Block& block = *me.block;
    const unsigned warp = me.index / 32, lane = me.index % 32;
    if (!(mask >> lane & 1)) fail(me, "warp collective at " + text(where) + ": the mask leaves out the calling lane");
    void* lanes[32] = {};
    bool complete_now = true;
    for (unsigned l = 0; l < 32; ++l) {
      if (!(mask >> l & 1)) continue;
      const unsigned i = warp * 32 + l;
      if (i >= block.threads.size())
        fail(me, "warp collective at " + text(where) + ": the mask names lanes beyond the block");
      Thread& other = block.threads[i];
      if (&other == &me) {
        lanes[l] = payload;
        continue;
      }
      if (other.state == State::kDone) {
        fail(me, "warp collective at " + text(where) + ": lane " + name(other) + " of the mask has ended");
      }
      if (other.state == State::kCollective && (other.mask >> lane & 1) &&
          (other.mask != mask || other.operation != operation || !same(other.where, where))) {
        fail(me, "warp collective at " + text(where) + " while lane " + name(other) + " is at another, of " +
                     text(other.where));
      }
      lanes[l] = other.payload;
      complete_now &= other.state == State::kCollective;
    }
    if (!complete_now) {
      me.mask = mask;
      me.operation = operation;
      me.payload = payload;
      wait(State::kCollective, where);
      return;
    }
    complete(lanes, mask);
    for (unsigned l = 0; l < 32; ++l) {
      if (mask >> l & 1 && l != lane) release(block.threads[warp * 32 + l]);
    }
    yield();
  }

  void spin() {
    if (++spins_ > kPatience * std::max<size_t>(ready_.size(), 1)) fail(*running_, "threads spin for ever");
    yield();
  }

  [[noreturn]] void fail(const Thread& thread, const std::string& message) {
    if (error_.empty())
      error_ = message + " (thread " + name(thread) + " of block " + std::to_string(thread.block->index) + ")";
    for (;;) swapcontext(&running_->context, &scheduler_);  // never resumed
  }

 private:
  static std::string name(const Thread& thread) { return std::to_string(thread.index); }

  static void enter() {
    Machine& machine = current();
    machine.kernel_();
    Thread& me = *machine.running_;
    land(me, 0);
    me.state = State::kDone;
    for (const Thread& other : me.block->threads) {
      if (other.state == State::kBarrier) {
        machine.fail(me, "thread ends while thread " + name(other) + " waits at __syncthreads of " + text(other.where));
      }
    }
    --machine.alive_;
    machine.spins_ = 0;
    swapcontext(&me.context, &machine.scheduler_);
  }

  void run_blocks(const std::vector<unsigned>& indices) {
    const unsigned threads = launch_.block.x;
    std::vector<Block> blocks(indices.size());
    ready_.clear();
    for (size_t b = 0; b < blocks.size(); ++b) {
      Block& block = blocks[b];
      block.index = indices[b];
      // exactly as large as asked for, so that a sanitizer sees what lies beyond
      block.memory.reset(new unsigned char[launch_.shared_bytes + kShared]);
      const auto address = reinterpret_cast<uintptr_t>(block.memory.get()) + launch_.shared_bytes + kShared;
      block.shared = reinterpret_cast<unsigned char*>((address - launch_.shared_bytes) / kShared * kShared);
      for (unsigned char* p = block.shared; p < block.shared + launch_.shared_bytes; ++p) *p = uint8_t(random_());
      block.threads.resize(threads);
      for (unsigned i = 0; i < threads; ++i) {
        Thread& thread = block.threads[i];
        thread.block = &block;
        thread.index = i;
        thread.stack.reset(new char[kStack]);
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack.get();
        thread.context.uc_stack.ss_size = kStack;
        thread.context.uc_link = nullptr;
        makecontext(&thread.context, &Machine::enter, 0);
        ready_.push_back(&thread);
      }
    }
    alive_ = blocks.size() * threads;
    spins_ = 0;
    while (alive_ > 0 && error_.empty()) {
      if (ready_.empty()) {
        error_ = "no thread can go on: " + stuck(blocks);
        return;
      }
      const size_t next = size_t(random_() % ready_.size());
      running_ = ready_[next];
      ready_[next] = ready_.back();
      ready_.pop_back();
      swapcontext(&scheduler_, &running_->context);
    }
  }

  static std::string stuck(const std::vector<Block>& blocks) {
    for (const Block& block : blocks) {
      for (const Thread& thread : block.threads) {
        if (thread.state != State::kBarrier && thread.state != State::kCollective) continue;
        const char* at = thread.state == State::kBarrier ? "__syncthreads" : "a warp collective";
        return "thread " + name(thread) + " of block " + std::to_string(block.index) + " waits at " + at + " of " +
               text(thread.where);
      }
    }
    return "";
  }

  void wait(State state, const Where& where) {
    running_->state = state;
    running_->where = where;
    swapcontext(&running_->context, &scheduler_);
  }

  void yield() {
    ready_.push_back(running_);
    swapcontext(&running_->context, &scheduler_);
  }

  void release(Thread& thread) {
    thread.state = State::kReady;
    spins_ = 0;
    ready_.push_back(&thread);
  }

 public:
  // Lets all but the last `left` groups of a thread's copies land.
  static void land(Thread& thread, size_t left) {
    auto& groups = thread.groups;
    while (groups.size() > left) {
      for (const Copy& copy : groups.front()) {
        if (copy.from) {
          std::memcpy(copy.to, copy.from, copy.bytes);
        } else {
          std::memset(copy.to, 0, copy.bytes);
        }
      }
      groups.erase(groups.begin());
    }
  }

 private:
  static inline Machine* current_ = nullptr;
  const Launch launch_;
  const std::function<void()> kernel_;
  std::mt19937_64 random_;
  std::vector<Thread*> ready_;
  Thread* running_ = nullptr;
  ucontext_t scheduler_;
  size_t alive_ = 0;
  uint64_t spins_ = 0;
  std::string error_;
};

inline Thread& thread() { return Machine::current().thread(); }

// One value a lane in, one a lane out: result(all lanes' values, mask, lane).
template <class T, class Result>
auto exchange(uint32_t mask, T value, const void* operation, const Where& where, const Result& result) {
  struct Payload {
    T value;
    T all[32];
  } payload{value, {}};
  Machine::current().collective(mask, operation, &payload, where, [](void* const* lanes, uint32_t present) {
    for (int l = 0; l < 32; ++l) {
      for (int m = 0; m < 32; ++m) {
        if (present >> l & present >> m & 1)
          static_cast<Payload*>(lanes[l])->all[m] = static_cast<Payload*>(lanes[m])->value;
      }
    }
  });
  return result(payload.all);
}

template <class T, class Combine>
T reduce(uint32_t mask, T value, const void* operation, const Where& where, const Combine& combine) {
  return exchange(mask, value, operation, where, [&](const T* all) {
    bool first = true;
    T total{};
    for (int l = 0; l < 32; ++l) {
      if (!(mask >> l & 1)) continue;
      total = first ? all[l] : combine(total, all[l]);
      first = false;
    }
    return total;
  });
}

}  // namespace flashprune::emulation

// ---- CUDA's names
// ----------------------------------------------------------------------------------------------------
#define threadIdx (dim3{::flashprune::emulation::thread().index, 0, 0})
#define blockIdx (::flashprune::emulation::Machine::current().block_index())
#define blockDim (::flashprune::emulation::Machine::current().launch().block)
#define gridDim (::flashprune::emulation::Machine::current().launch().grid)

#define FLASHPRUNE_WHERE ::flashprune::emulation::Where where = ::flashprune::emulation::Where::current()

inline void __syncthreads(FLASHPRUNE_WHERE) { flashprune::emulation::Machine::current().barrier(0, where); }
inline int __syncthreads_count(int vote, FLASHPRUNE_WHERE) {
  flashprune::emulation::Machine::current().barrier(vote, where);
  return flashprune::emulation::thread().block->votes;
}
inline int __syncthreads_or(int vote, FLASHPRUNE_WHERE) { return __syncthreads_count(vote, where) > 0; }
inline int __syncthreads_and(int vote, FLASHPRUNE_WHERE) { return __syncthreads_count(!vote, where) == 0; }

inline void __syncwarp(uint32_t mask = 0xffffffffu, FLASHPRUNE_WHERE) {
  static const char op = 0;
  flashprune::emulation::exchange(mask, 0, &op, where, [](const int*) { return 0; });
}

inline unsigned __activemask() = delete;  // says nothing that a kernel may rely on

template <class T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32, FLASHPRUNE_WHERE) {
  static const char op = 0;
  const int lane = int(threadIdx.x % 32);
  return flashprune::emulation::exchange(mask, value, &op, where,
                                         [&](const T* all) { return all[lane / width * width + source % width]; });
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int lanes, int width = 32, FLASHPRUNE_WHERE) {
  static const char op = 0;
  const int lane = int(threadIdx.x % 32), from = lane ^ lanes;
  return flashprune::emulation::exchange(mask, value, &op, where,
                                         [&](const T* all) { return all[from / width == lane / width ? from : lane]; });
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32, FLASHPRUNE_WHERE) {
  static const char op = 0;
  const int lane = int(threadIdx.x % 32), from = lane - int(delta);
  return flashprune::emulation::exchange(mask, value, &op, where,
                                         [&](const T* all) { return all[from >= lane / width * width ? from : lane]; });
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32, FLASHPRUNE_WHERE) {
  static const char op = 0;
  const int lane = int(threadIdx.x % 32), from = lane + int(delta);
  return flashprune::emulation::exchange(
      mask, value, &op, where, [&](const T* all) { return all[from < (lane / width + 1) * width ? from : lane]; });
}
inline unsigned __ballot_sync(uint32_t mask, int vote, FLASHPRUNE_WHERE) {
  static const char op = 0;
  return flashprune::emulation::exchange(mask, vote, &op, where, [&](const int* all) {
    unsigned bits = 0;
    for (int l = 0; l < 32; ++l) bits |= unsigned((mask >> l & 1) && all[l]) << l;
    return bits;
  });
}
inline int __any_sync(uint32_t mask, int vote, FLASHPRUNE_WHERE) { return __ballot_sync(mask, vote, where) != 0; }
inline int __all_sync(uint32_t mask, int vote, FLASHPRUNE_WHERE) { return __ballot_sync(mask, !vote, where) == 0; }
template <class T>
unsigned __match_any_sync(uint32_t mask, T value, FLASHPRUNE_WHERE) {
  static const char op = 0;
  return flashprune::emulation::exchange(mask, value, &op, where, [&](const T* all) {
    unsigned bits = 0;
    for (int l = 0; l < 32; ++l) bits |= unsigned((mask >> l & 1) && all[l] == value) << l;
    return bits;
  });
}
#define FLASHPRUNE_REDUCE(name, T, expression)                                                               \
  inline T name(uint32_t mask, T value, FLASHPRUNE_WHERE) {                                                  \
    static const char op = 0;                                                                                \
    return flashprune::emulation::reduce(mask, value, &op, where, [](T a, T b) -> T { return expression; }); \
  }
FLASHPRUNE_REDUCE(__reduce_max_sync, unsigned, std::max(a, b))
FLASHPRUNE_REDUCE(__reduce_min_sync, unsigned, std::min(a, b))
FLASHPRUNE_REDUCE(__reduce_add_sync, unsigned, a + b)
FLASHPRUNE_REDUCE(__reduce_or_sync, unsigned, a | b)
FLASHPRUNE_REDUCE(__reduce_max_sync, int, std::max(a, b))
FLASHPRUNE_REDUCE(__reduce_min_sync, int, std::min(a, b))
FLASHPRUNE_REDUCE(__reduce_add_sync, int, a + b)
#undef FLASHPRUNE_REDUCE

// Fibers change only where they wait: a plain operation is atomic, and every write is seen by all at once.
template <class T>
T atomicAdd(T* p, T value) {
  return std::exchange(*p, T(*p + value));
}
template <class T>
T atomicMax(T* p, T value) {
  return std::exchange(*p, std::max(*p, value));
}
template <class T>
T atomicMin(T* p, T value) {
  return std::exchange(*p, std::min(*p, value));
}
template <class T>
T atomicOr(T* p, T value) {
  return std::exchange(*p, T(*p | value));
}
template <class T>
T atomicExch(T* p, T value) {
  return std::exchange(*p, value);
}
inline void __threadfence() {}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }

template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}
