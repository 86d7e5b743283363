// The kernels for x86-64 processors with AVX-512.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include "kernels.h"  // before the pragma, with its library headers: what they define is shared with other files

#include <cstring>

#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in GCC's own header of intrinsics
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,f16c")
#define CWCLIP_ISA avx512
#define CWCLIP_VECTOR_BYTES 64
#include "kernels_isa.h"
#endif
