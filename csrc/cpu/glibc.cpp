// Since glibc 2.32 libstdc++ asks the C library whether there is one thread alone, to count references without atomics.
// Answered here, "no", the library loads on older ones too.
#if defined(__linux__)
extern "C" __attribute__((visibility("hidden"))) char __libc_single_threaded;
char __libc_single_threaded = 0;
#endif
