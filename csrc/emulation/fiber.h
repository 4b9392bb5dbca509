// Stacks that take turns on one thread of the CPU.
//
// A switch is _setjmp and _longjmp, which cost no system call; makecontext only makes the first entry into a stack.
// Sanitizers are told of every switch.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstddef>
#include <memory>

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define __SANITIZE_ADDRESS__ 1
#endif
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#ifdef __GLIBC__
// The same function without the check of _FORTIFY_SOURCE, which takes a jump to another stack for a mistake.
extern "C" void flashprune_longjmp(__jmp_buf_tag*, int) __asm__("_longjmp");
#else
#define flashprune_longjmp _longjmp
#endif

namespace flashprune::emulation {

class Fiber {
 public:
  // The stack that is running already.
  Fiber() = default;

  // A stack of its own; body starts with the first switch to it and never returns.
  explicit Fiber(void (*body)())
      : memory_(new char[kBytes]), bottom_(memory_.get()), bytes_(kBytes - made_++ % 128 * kApart), body_(body) {
    getcontext(&entry_);
    entry_.uc_stack.ss_sp = memory_.get();
    entry_.uc_stack.ss_size = bytes_;
    entry_.uc_link = nullptr;
    makecontext(&entry_, &Fiber::enter, 0);
  }
  Fiber(const Fiber&) = delete;

  // Goes on where next stands; returns when some fiber switches back.
  [[gnu::noinline]] void switch_to(Fiber& next) {
    from_ = this;
    to_ = &next;
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(&fake_stack_, next.bottom_, next.bytes_);
#endif
    if (_setjmp(place_) == 0) {
      if (!next.entered_ && next.body_) {
        next.entered_ = true;
        setcontext(&next.entry_);
      }
      flashprune_longjmp(next.place_, 1);
    }
    arrive();
  }

 private:
  static constexpr size_t kBytes = 256 << 10;
  static constexpr size_t kApart = 576;  // so that the stacks do not compete for the same lines of a cache

  static void enter() {
    arrive();
    to_->body_();
  }

  static void arrive() {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(to_->fake_stack_, &from_->bottom_, &from_->bytes_);
#endif
  }

  static inline size_t made_ = 0;
  static inline Fiber *from_ = nullptr, *to_ = nullptr;  // of the last switch
  std::unique_ptr<char[]> memory_;
  const void* bottom_ = nullptr;
  size_t bytes_ = 0;
  void (*body_)() = nullptr;
  bool entered_ = false;
  void* fake_stack_ = nullptr;
  ucontext_t entry_;
  jmp_buf place_;
};

}  // namespace flashprune::emulation
