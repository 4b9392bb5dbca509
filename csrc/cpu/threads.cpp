#include "threads.h"

#include <pthread.h>

#include <atomic>
#include <cfenv>
#include <mutex>
#include <system_error>
#include <thread>

#include "flashprune/team.h"
#include "interruption.h"

namespace flashprune {
namespace {

struct Pool {
  std::mutex leader;  // held by the call that has the team
  Team team;
  int size = 1;  // leader and helpers

  // As many as the system gives; the work gets done with any number.
  void grow(int threads) {
    try {
      for (; size < threads; ++size)
        std::thread([this, helper = size] {
          std::fesetenv(FE_DFL_ENV);  // a new thread has its maker's
          team.help(helper);
        }).detach();
    } catch (const std::system_error&) {
    }
  }
};

// Arithmetic by the book while it lives, subnormal numbers included: a caller's torch.set_flush_denormal holds for its
// own thread alone, and the team has to agree.
class DefaultArithmetic {
 public:
  DefaultArithmetic() {
    std::fegetenv(&callers_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultArithmetic() { std::fesetenv(&callers_); }

 private:
  std::fenv_t callers_;
};

// Never destroyed: helpers sleep in it until the process ends.
std::atomic<Pool*> current{nullptr};

// Threads do not survive a fork. The child leaves the parent's pool alone and starts anew.
void forget_pool() { current.store(nullptr); }

Pool& pool() {
  static std::mutex making;
  static const int registered = pthread_atfork(nullptr, nullptr, forget_pool);
  (void)registered;
  if (Pool* made = current.load()) return *made;
  const std::lock_guard<std::mutex> lock(making);
  if (!current.load()) current.store(new Pool);
  return *current.load();
}

}  // namespace

void run_serially(int tasks, const std::function<void(int)>& body) {
  for (int task = 0; task < tasks; ++task) body(task);
}

void with_threads(int threads, const std::function<void(const ParallelFor&)>& work) {
  const DefaultArithmetic arithmetic;
  Interruption interruption;
  const auto poll = [&] { interruption.poll(); };
  if (threads <= 1) return work({1, run_serially, poll});
  Pool& here = pool();
  const std::unique_lock<std::mutex> lead(here.leader, std::try_to_lock);
  if (!lead.owns_lock()) return work({1, run_serially, poll});
  here.grow(threads);
  const auto run = [&](int tasks, const std::function<void(int)>& body) {
    if (tasks > 1) {
      here.team.run(threads, tasks, body);
    } else {
      run_serially(tasks, body);
    }
  };
  work({threads, run, poll});
}

}  // namespace flashprune
