#include "interruption.h"

#include <pthread.h>

#include <stdexcept>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

// Of Python's stable ABI, objects as void*. Weak: the library is made for every Python, and for processes without one.
extern "C" {
#define FLASHPRUNE_WEAK __attribute__((weak))
FLASHPRUNE_WEAK int Py_IsInitialized();
FLASHPRUNE_WEAK int PyGILState_Ensure();
FLASHPRUNE_WEAK void PyGILState_Release(int state);
FLASHPRUNE_WEAK int PyErr_CheckSignals();
FLASHPRUNE_WEAK void PyErr_Fetch(void** type, void** value, void** traceback);
FLASHPRUNE_WEAK void PyErr_Restore(void* type, void* value, void* traceback);
FLASHPRUNE_WEAK int Py_AddPendingCall(int (*call)(void*), void* argument);
FLASHPRUNE_WEAK void Py_DecRef(void* object);
}

namespace flashprune {
namespace {

// Python runs signal handlers on its main thread only; others need not wait for the GIL.
bool on_main_thread() {
#if defined(__linux__)
  return getpid() == pid_t(syscall(SYS_gettid));
#elif defined(__APPLE__)
  return pthread_main_np() != 0;
#else
  return true;
#endif
}

// What a handler raised, until Python takes it back. Of the main thread, under the GIL.
struct Raised {
  void* parts[3] = {};  // type, value, traceback

  void keep() {
    for (void* part : parts) Py_DecRef(part);
    PyErr_Fetch(&parts[0], &parts[1], &parts[2]);
  }

  static int again(void* self) {
    void*(&parts)[3] = static_cast<Raised*>(self)->parts;
    if (!parts[0]) return 0;
    PyErr_Restore(parts[0], parts[1], parts[2]);
    for (void*& part : parts) part = nullptr;
    return -1;
  }
};

bool handler_raises() {
  if (!Py_IsInitialized || !Py_IsInitialized()) return false;
  static Raised raised;
  const int gil = PyGILState_Ensure();
  const bool raises = PyErr_CheckSignals() != 0;
  if (raises) {
    raised.keep();
    Py_AddPendingCall(Raised::again, &raised);
  }
  PyGILState_Release(gil);
  return raises;
}

}  // namespace

void Interruption::poll() {
  if (!stopped_.load(std::memory_order_relaxed)) {
    if (std::this_thread::get_id() != caller_) return;
    const Clock::time_point now = Clock::now();
    if (now < next_ || !on_main_thread()) return;
    const bool raises = handler_raises();
    next_ = Clock::now() + kPatience;
    if (!raises) return;
    stopped_.store(true, std::memory_order_relaxed);
  }
  throw std::runtime_error("flashprune: interrupted by a signal");
}

}  // namespace flashprune
