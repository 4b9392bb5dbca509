// Ctrl-C in a long call.
#pragma once

#include <atomic>
#include <chrono>
#include <thread>

namespace flashprune {

// Of one call, made on the thread that calls. While that is Python's main thread, polls have Python run the handlers of
// the signals that wait; once one has raised, every poll of the call throws. What the handler raised is raised again at
// the next opportunity, the next Python function call of that thread: see python/flashprune/operators.py.
class Interruption {
 public:
  // Cheap, and safe on every thread that works for the call. Takes the GIL every kPatience alone.
  void poll();

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr std::chrono::milliseconds kPatience{50};

  const std::thread::id caller_ = std::this_thread::get_id();
  Clock::time_point next_ = Clock::now() + kPatience;
  std::atomic<bool> stopped_{false};
};

}  // namespace flashprune
