// A team of threads for jobs of ten to a thousand microseconds.
//
// The engine runs a hundred rounds a call, each a small job. A fork and join for each (OpenMP) waits, every time, until
// all threads have had the processor; on a machine that is busy with something else that is a scheduler's time slice a
// round (measured on 2 cores at load 3: 68 ms instead of 0.8 for MMR at N = 576). Here nobody waits for a thread that
// has not come: a job is over when its tasks are done, by whoever was there.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>

namespace flashprune {

class Team {
 public:
  // Called by the one thread that leads: runs body(0) ... body(tasks - 1) with the helpers 1 ... threads - 1, those
  // that come. Rethrows what a body threw; bodies that have not begun by then are left out.
  void run(int threads, int tasks, const std::function<void(int)>& body) {
    ++job_;
    // A latecomer may still hold a ticket of the job before. It is void before the new job's numbers can be seen.
    ticket_.store(uint64_t(job_) << 32 | kNoTask, std::memory_order_release);
    threads_.store(threads, std::memory_order_release);
    tasks_.store(tasks, std::memory_order_release);
    body_.store(&body, std::memory_order_release);
    done_.store(0, std::memory_order_relaxed);
    failed_.store(false, std::memory_order_relaxed);
    ticket_.store(uint64_t(job_) << 32, std::memory_order_release);
    signal_.store(job_, std::memory_order_release);
    signal_.notify_all();
    while (take(job_)) {
    }
    for (int done; (done = done_.load(std::memory_order_acquire)) < tasks;) {
      if (!spin([&] { return done_.load(std::memory_order_acquire) != done; }))
        done_.wait(done, std::memory_order_acquire);
    }
    if (failed_.load(std::memory_order_acquire)) std::rethrow_exception(error_);
  }

  // The life of helper 1, 2, ...
  [[noreturn]] void help(int helper) {
    for (uint32_t job = 0;;) {
      if (!spin([&] { return signal_.load(std::memory_order_acquire) != job; }))
        signal_.wait(job, std::memory_order_acquire);
      job = signal_.load(std::memory_order_acquire);
      while (helper < threads_.load(std::memory_order_acquire) && take(job)) {
      }
    }
  }

 private:
  static constexpr uint32_t kNoTask = 0x7fffffffu;
  // About 50 us, the time between two jobs of a call: waking a thread that sleeps takes as long.
  static constexpr int kSpins = 2000;

  template <class Ready>
  static bool spin(const Ready& ready) {
    for (int i = 0; i < kSpins; ++i) {
      if (ready()) return true;
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
    return false;
  }

  // Runs the next task of the job; false if there is none, or if the job is over. tasks_ and body_ may by then belong
  // to a later job, but then the ticket has changed too, and the exchange fails.
  bool take(uint32_t job) {
    uint64_t ticket = ticket_.load(std::memory_order_acquire);
    int task, tasks;
    const std::function<void(int)>* body;
    do {
      if (uint32_t(ticket >> 32) != job) return false;
      task = int(uint32_t(ticket));
      tasks = tasks_.load(std::memory_order_acquire);
      body = body_.load(std::memory_order_acquire);
      if (task >= tasks) return false;
    } while (!ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel, std::memory_order_acquire));
    try {
      if (!failed_.load(std::memory_order_relaxed)) (*body)(task);
    } catch (...) {
      if (!failed_.exchange(true, std::memory_order_acq_rel)) error_ = std::current_exception();
    }
    if (done_.fetch_add(1, std::memory_order_acq_rel) + 1 == tasks) done_.notify_one();
    return true;
  }

  uint32_t job_ = 0;                 // the leader's count of jobs
  std::atomic<uint64_t> ticket_{0};  // job << 32 | next task
  std::atomic<uint32_t> signal_{0};  // the job to help with
  std::atomic<int> threads_{0};
  std::atomic<int> tasks_{0};
  std::atomic<const std::function<void(int)>*> body_{nullptr};
  std::atomic<int> done_{0};
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;
};

}  // namespace flashprune
