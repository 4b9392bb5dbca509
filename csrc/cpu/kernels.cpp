// Picks the instruction set once, at the first call.
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

const Kernels& kernels() {
#if defined(__x86_64__)
  static const Kernels& best = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                                       __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw")
                                   ? avx512::table
                               : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? avx2::table
                                                                                                 : baseline::table;
  return best;
#else
  return baseline::table;
#endif
}

}  // namespace flashprune
