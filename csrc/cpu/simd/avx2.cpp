// The kernels for x86-64 processors from about 2013 on.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include "kernels.h"  // before the pragma, with its library headers: what they define is shared with other files

#include <cstring>

#pragma GCC target("avx2,f16c")
#define CWCLIP_ISA avx2
#define CWCLIP_VECTOR_BYTES 32
#include "kernels_isa.h"
#endif
