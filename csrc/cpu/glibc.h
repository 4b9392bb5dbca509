// Included before every file of the CPU library. Where that is built on a new glibc, these names get that glibc's
// versions, and the library would not load on an older one; what the first versions do is all that it needs.
// auditwheel, in `make wheel`, tells when another name is missing here.
#pragma once

#include <features.h>

#if defined(__GLIBC__) && defined(__x86_64__)
__asm__(".symver exp, exp@GLIBC_2.2.5");
__asm__(".symver hypot, hypot@GLIBC_2.2.5");
__asm__(".symver log, log@GLIBC_2.2.5");
__asm__(".symver pthread_mutex_trylock, pthread_mutex_trylock@GLIBC_2.2.5");
#endif
