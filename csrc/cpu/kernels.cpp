// Picks the instruction set once, at the first call.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "flashprune/kernels.h"

namespace flashprune {

namespace baseline {
extern const Kernels table;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
#endif

const std::vector<const Kernels*>& runnable_kernels() {
  static const std::vector<const Kernels*> tables = [] {
    std::vector<const Kernels*> runnable;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw")) {
      runnable.push_back(&avx512::table);
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) runnable.push_back(&avx2::table);
#endif
    runnable.push_back(&baseline::table);
    return runnable;
  }();
  return tables;
}

const Kernels& kernels() {
  static const Kernels& chosen = [&]() -> const Kernels& {
    const char* wanted = std::getenv("FLASHPRUNE_ISA");
    if (wanted == nullptr || *wanted == '\0') return *runnable_kernels().front();
    std::string names;
    for (const Kernels* kernels : runnable_kernels()) {
      if (std::string(wanted) == kernels->name) return *kernels;
      names += (names.empty() ? "" : ", ") + std::string(kernels->name);
    }
    throw std::invalid_argument("FLASHPRUNE_ISA=" + std::string(wanted) + " does not run here, only " + names);
  }();
  return chosen;
}

}  // namespace flashprune
