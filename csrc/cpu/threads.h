// The process's team of threads.
#pragma once

#include <functional>

#include "flashprune/rows.h"

namespace flashprune {

void run_serially(int tasks, const std::function<void(int)>& body);

// Calls work with a ParallelFor of up to `threads` threads, this one included. Threads are made at first need and kept;
// when another call has them, this one works alone.
void with_threads(int threads, const std::function<void(const ParallelFor&)>& work);

}  // namespace flashprune
