// Starts kernels on the emulation, with the interface of include/flashprune/launch.cuh.
#pragma once

#include <cstring>
#include <tuple>
#include <utility>
#include <vector>

#include "flashprune/launch.cuh"

namespace flashprune::emulation {

class Stream {
 public:
  // blocks: how many the pretended device holds at once.
  Stream(uint64_t seed, int blocks) : seed_(seed), blocks_(blocks) { last_launches_ = 0; }

  template <class... P, class... A>
  void launch(void (*kernel)(P...), const gpu::Shape& shape, A&&... arguments) {
    const auto [x, y, z] = shape.grid;
    if (x == 0 || y == 0 || z == 0 || x > 0x7fffffffu || y > 65535 || z > 65535)
      throw std::runtime_error("a launch has no blocks, or too many");
    if (shape.threads <= 0 || shape.threads > 1024 || shape.threads % 32 != 0)
      throw std::runtime_error("a block has no whole warps, or too many");
    if (shape.shared_bytes > shared_limit()) throw std::runtime_error("a block asks for too much shared memory");
    if (shape.cooperative && uint64_t(x) * y * z > uint64_t(blocks_))
      throw std::runtime_error("a cooperative launch has more blocks than the device holds");
    std::tuple<P...> values(std::forward<A>(arguments)...);
    const Launch launch{.grid = shape.grid,
                        .block = {unsigned(shape.threads), 1, 1},
                        .shared_bytes = shape.shared_bytes,
                        .cooperative = shape.cooperative,
                        .seed = seed_++,
                        .resident = unsigned(blocks_)};
    Machine(launch, [&] { std::apply(kernel, values); }).run();
    last_launches_ = ++launches_;
  }
  void zero(void* memory, size_t bytes) { std::memset(memory, 0, bytes); }
  template <class Kernel>
  int resident_blocks(Kernel, int, size_t) const {
    return blocks_;
  }
  int multiprocessors() const { return blocks_; }
  size_t shared_limit() const { return 99 << 10; }  // of the smallest GPU that is served
  int launches() const { return launches_; }
  static int last_launches() { return last_launches_; }  // of the stream that was made last

 private:
  uint64_t seed_;
  const int blocks_;
  int launches_ = 0;
  static inline int last_launches_ = 0;
};

}  // namespace flashprune::emulation
