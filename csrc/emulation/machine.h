// Runs the threads of a launch: each is a fiber that runs until it has to wait. See cuda.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <new>
#include <source_location>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "emulation/fiber.h"

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

namespace flashprune::emulation {

using Where = std::source_location;

inline std::string text(const Where& where) {
  const std::string file = where.file_name();
  return file.substr(file.find_last_of('/') + 1) + ":" + std::to_string(where.line());
}

inline bool same(const Where& a, const Where& b) {
  if (a.line() != b.line() || a.column() != b.column()) return false;
  return a.file_name() == b.file_name() || std::strcmp(a.file_name(), b.file_name()) == 0;
}

enum class State { kReady, kSpin, kBarrier, kCollective, kDone };

// Sixteen bytes on their way from global to shared memory.
struct Copy {
  void* to;
  const void* from;  // null: what is in data
  unsigned char data[16];
  unsigned group;
};

struct Block;

struct Thread {
  Block* block = nullptr;
  dim3 index;  // of one dimension
  Fiber* fiber = nullptr;
  State state = State::kReady;
  Where where;        // it waits
  uint32_t mask = 0;  // of the collective that it waits in
  const void* operation = nullptr;
  void* payload = nullptr;
  std::vector<Copy> copies;
  unsigned groups = 0;  // of copies committed
};

struct Warp {
  uint32_t waiting = 0, ended = 0;
};

// Memory of exactly the size asked for, so that a sanitizer sees what lies beyond.
struct Shared {
  static constexpr std::align_val_t kAlignment{128};
  explicit Shared(size_t bytes) : data(static_cast<unsigned char*>(::operator new(bytes, kAlignment))) {}
  ~Shared() { ::operator delete(data, kAlignment); }
  Shared(const Shared&) = delete;
  unsigned char* const data;
};

struct Block {
  dim3 index;
  unsigned number = 0;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  unsigned waiting = 0, ended = 0;  // threads
  Where where;                      // of the barrier that they wait at
  int voting = 0, votes = 0;        // at this barrier, and at the last
  std::unique_ptr<Shared> memory;
  unsigned char* shared = nullptr;
};

struct Launch {
  dim3 grid, block;
  size_t shared_bytes = 0;
  bool cooperative = false;
  uint64_t seed = 0;
  unsigned resident = 1;  // blocks that the device holds at once
};

inline Thread* self = nullptr;  // whose turn it is

class Machine {
 public:
  Machine(const Launch& launch, std::function<void()> kernel)
      : launch_(launch), kernel_(std::move(kernel)), random_(launch.seed), run_ahead_(launch.seed % 3) {}

  void run() {
    current_ = this;
    const unsigned blocks = launch_.grid.x * launch_.grid.y * launch_.grid.z;
    for (unsigned b = 0; b < blocks; ++b) {
      order_.push_back(b);
      std::swap(order_[b], order_[draw(b + 1)]);
    }
    const size_t together = launch_.cooperative ? blocks : std::min({blocks, launch_.resident, kTogether});
    while (fibers_.size() < together * launch_.block.x) fibers_.push_back(std::make_unique<Fiber>(&Machine::body));
    blocks_ = std::vector<Block>(together);
    for (Block& block : blocks_) begin(block);
    self = next();
    home_.switch_to(*self->fiber);
    if (ended_ < blocks && error_.empty()) error_ = "no thread can go on: " + standing();
    current_ = nullptr;
    self = nullptr;
    if (error_.empty()) return;
    fibers_.clear();  // they stand in the middle of the kernel
    throw std::runtime_error(error_);
  }

  static Machine& current() { return *current_; }
  const Launch& launch() const { return launch_; }

  uint64_t random() {  // splitmix64
    uint64_t x = random_ += 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
  }
  unsigned draw(unsigned below) { return unsigned((random() >> 32) * below >> 32); }

  // Returns once all threads of the block are here.
  void barrier(bool vote, const Where& where) {
    Block& block = *self->block;
    if (block.ended > 0)
      fail("__syncthreads at " + text(where) + " after " + name(of(block, State::kDone)) + " has ended");
    if (block.waiting > 0 && !same(block.where, where)) {
      fail("__syncthreads at " + text(where) + " while " + name(of(block, State::kBarrier)) + " is at that of " +
           text(block.where));
    }
    block.where = where;
    block.voting += vote;
    if (++block.waiting < block.threads.size()) return wait(State::kBarrier, where);
    block.waiting = 0;
    block.votes = std::exchange(block.voting, 0);
    self->state = State::kReady;
    progress();
    const unsigned threads = unsigned(block.threads.size()), first = draw(threads);
    for (unsigned i = 0; i < threads; ++i) {
      Thread& next = block.threads[(first + i) % threads];
      next.state = State::kReady;
      ready_.push_back(&next);
    }
    pass_on();
  }

  // Returns once all lanes of the mask are here and the last one has run complete(lanes' payloads, mask).
  void collective(uint32_t mask, void* payload, void (*complete)(void* const*, uint32_t), const Where& where) {
    Thread& me = *self;
    const unsigned warp_index = me.index.x / 32, lane = me.index.x % 32;
    Warp& warp = me.block->warps[warp_index];
    Thread* const warp_threads = &me.block->threads[warp_index * 32];
    if (!(mask >> lane & 1)) fail("warp collective at " + text(where) + ": the mask leaves out the calling lane");
    if (mask & warp.ended) {
      const Thread& other = warp_threads[__builtin_ctz(mask & warp.ended)];
      fail("warp collective at " + text(where) + ": " + name(other) + " of the mask has ended");
    }
    me.mask = mask;
    me.operation = reinterpret_cast<const void*>(complete);
    me.payload = payload;
    me.where = where;
    warp.waiting |= 1u << lane;
    if (mask & ~warp.waiting) return wait(State::kCollective, where);
    void* payloads[32] = {};
    for (unsigned l = 0; l < 32; ++l) {
      const Thread& other = warp_threads[l];
      if (!(mask >> l & 1)) continue;
      payloads[l] = other.payload;
      if (other.mask == mask && other.operation == me.operation && same(other.where, where)) continue;
      // It may be in another collective before it comes to this one, but then not in one with this lane.
      if (!(other.mask >> lane & 1)) return wait(State::kCollective, where);
      fail("warp collective at " + text(where) + " while " + name(other) + " is at another, of " + text(other.where));
    }
    complete(payloads, mask);
    warp.waiting &= ~mask;
    progress();
    for (unsigned l = 0; l < 32; ++l) {
      if (!(mask >> l & 1)) continue;
      warp_threads[l].state = State::kReady;
      ready_.push_back(&warp_threads[l]);
    }
    pass_on();
  }

  // Gives others a turn where on a GPU they might come in between.
  void preempt() {
    ready_.push_back(self);
    pass_on();
  }

  // Memory has changed that a spinning thread may wait for.
  void progress() { spins_ = 0; }

  // A turn of a loop that waits for other threads.
  void spin(const Where& where) {
    if (++spins_ > kPatience * (ready_.size() + 1)) fail("threads spin for ever at " + text(where) + ": " + standing());
    self->state = State::kSpin;
    self->where = where;
    ready_.push_back(self);
    std::swap(ready_.back(), ready_[draw(unsigned(ready_.size()))]);
    pass_on();
    self->state = State::kReady;
  }

  void copy_async(void* to, const void* from, const Where& where) {
    unsigned char* const shared = self->block->shared;
    if (to < shared || static_cast<unsigned char*>(to) + 16 > shared + launch_.shared_bytes)
      fail("asynchronous copy at " + text(where) + " to what is not shared memory of the block");
    if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16)
      fail("asynchronous copy at " + text(where) + ": address not aligned to 16 bytes");
    Copy copy{to, from, {}, self->groups};
    if (from && random() % 2) std::memcpy(copy.data, std::exchange(copy.from, nullptr), 16);  // read now, or at the end
    self->copies.push_back(copy);
    noise(to, 16);
  }
  void copy_commit() { ++self->groups; }

  // Lets all but the last `left` groups of the thread's copies land.
  void copy_wait(unsigned left) {
    auto& copies = self->copies;
    size_t landed = 0;
    for (; landed < copies.size() && copies[landed].group + left < self->groups; ++landed) {
      const Copy& copy = copies[landed];
      std::memcpy(copy.to, copy.from ? copy.from : copy.data, 16);
    }
    copies.erase(copies.begin(), copies.begin() + ptrdiff_t(landed));
  }

  [[noreturn]] void fail(const std::string& message) {
    error_ = message + " (" + name(*self) + " of block " + std::to_string(self->block->number) + ")";
    for (;;) self->fiber->switch_to(home_);  // never comes back
  }

 private:
  static constexpr unsigned kTogether = 4;     // blocks alive at once, of a launch that is not cooperative
  static constexpr uint64_t kPatience = 4096;  // turns of each thread with nothing but spinning

  static std::string name(const Thread& thread) { return "thread " + std::to_string(thread.index.x); }

  static const Thread& of(const Block& block, State state) {
    return *std::find_if(block.threads.begin(), block.threads.end(), [&](const Thread& t) { return t.state == state; });
  }

  static void body() {
    for (;;) current().run_thread();
  }

  void run_thread() {
    std::string thrown;
    try {
      kernel_();
    } catch (const std::exception& error) {
      thrown = error.what();
    }
    if (!thrown.empty()) fail(thrown);
    Block& block = *self->block;
    if (block.waiting > 0)
      fail("thread ends while " + name(of(block, State::kBarrier)) + " waits at __syncthreads of " + text(block.where));
    const unsigned lane = self->index.x % 32, first = self->index.x - lane;
    Warp& warp = block.warps[first / 32];
    for (uint32_t rest = warp.waiting; rest != 0; rest &= rest - 1) {
      const Thread& other = block.threads[first + unsigned(__builtin_ctz(rest))];
      if (other.mask >> lane & 1)
        fail("thread ends while " + name(other) + " waits for it at a warp collective of " + text(other.where));
    }
    self->state = State::kDone;
    ++block.ended;
    warp.ended |= 1u << lane;
    progress();
    if (block.ended == launch_.block.x) {
      ++ended_;
      if (begun_ < order_.size()) begin(block);
    }
    pass_on();  // copies that were not waited for never land
  }

  // The next block of the launch takes the place of one that has ended.
  void begin(Block& block) {
    const unsigned number = order_[begun_++], threads = launch_.block.x;
    const size_t place = size_t(&block - blocks_.data());
    block.number = number;
    block.ended = 0;
    block.index = {number % launch_.grid.x, number / launch_.grid.x % launch_.grid.y,
                   number / (launch_.grid.x * launch_.grid.y)};
    block.memory = std::make_unique<Shared>(launch_.shared_bytes);
    block.shared = block.memory->data;
    noise(block.shared, launch_.shared_bytes);
    block.threads.resize(threads);
    block.warps.assign(threads / 32, Warp{});
    for (unsigned i = 0; i < threads; ++i) {
      Thread& thread = block.threads[i];
      thread = Thread{};
      thread.block = &block;
      thread.index = {i, 0, 0};
      thread.fiber = fibers_[place * threads + i].get();
      ready_.push_back(&thread);
    }
  }

  // Of the threads that can run: any of them, or, so that one warp gets ahead of all others, the last to become ready.
  Thread* next() {
    const bool newest = run_ahead_ == 1 || (run_ahead_ == 2 && random() % 2);
    if (!newest) std::swap(ready_[draw(unsigned(ready_.size()))], ready_.back());
    Thread* const thread = ready_.back();
    ready_.pop_back();
    return thread;
  }

  void pass_on() {
    Thread* const me = self;
    if (ready_.empty()) return me->fiber->switch_to(home_);
    self = next();
    if (self != me) me->fiber->switch_to(*self->fiber);
  }

  void wait(State state, const Where& where) {
    self->state = state;
    self->where = where;
    pass_on();
  }

  void noise(void* memory, size_t bytes) {
    for (size_t i = 0; i < bytes; i += 8) {
      const uint64_t bits = random();
      std::memcpy(static_cast<char*>(memory) + i, &bits, std::min<size_t>(8, bytes - i));
    }
  }

  // Where the threads are, those at one place together.
  std::string standing() const {
    static constexpr const char* kVerbs[] = {"can run", "spin at ", "wait at __syncthreads of ",
                                             "wait at a warp collective of ", "have ended"};
    std::vector<std::pair<std::string, size_t>> places;
    for (const Block& block : blocks_) {
      for (const Thread& thread : block.threads) {
        std::string place = kVerbs[int(thread.state)];
        if (thread.state != State::kReady && thread.state != State::kDone) place += text(thread.where);
        place += " in block " + std::to_string(block.number);
        const auto found = std::find_if(places.begin(), places.end(), [&](const auto& p) { return p.first == place; });
        if (found == places.end()) {
          places.emplace_back(place, 1);
        } else {
          ++found->second;
        }
      }
    }
    std::string all;
    for (const auto& [place, count] : places)
      all += (all.empty() ? "" : ", ") + std::to_string(count) + " threads " + place;
    return all;
  }

  static inline Machine* current_ = nullptr;
  static inline std::vector<std::unique_ptr<Fiber>> fibers_;  // kept from launch to launch
  const Launch launch_;
  const std::function<void()> kernel_;
  uint64_t random_;
  const unsigned run_ahead_;
  std::vector<unsigned> order_;  // of the blocks
  size_t begun_ = 0, ended_ = 0;
  std::vector<Block> blocks_;  // those alive
  std::vector<Thread*> ready_;
  Fiber home_;
  uint64_t spins_ = 0;
  std::string error_;
};

}  // namespace flashprune::emulation
