// Power sums and scaling of one contiguous run of elements. Single-threaded, vectorised, no torch header.
#pragma once

#include "../../common/types.h"

namespace cwclip::cpu {

// sum |g|, sum g^2 or max |g| of n elements, good to 1e-6 (1e-14 for float64); NaN if any is NaN, for every order.
// Deterministic: the order of additions depends on n alone, not on alignment or thread.
double power_sum(const void* data, int64_t n, DType dtype, Order order);

// g <- coef * g; half precisions are widened to float32 and rounded once, to nearest even.
void scale(void* data, int64_t n, DType dtype, double coef);

// The kernels of one instruction set for one dtype; kernels_isa.h has the code of all of them.
struct Kernels {
  double (*power_sum)(const char*, int64_t, Order);
  void (*scale)(char*, int64_t, double);
};

// Four of them, by DType.
namespace baseline { extern const Kernels kernels[4]; }
namespace avx2 { extern const Kernels kernels[4]; }
namespace avx512 { extern const Kernels kernels[4]; }

}  // namespace cwclip::cpu
