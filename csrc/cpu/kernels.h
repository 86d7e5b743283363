// Power sums and scaling of one contiguous run of elements. Single-threaded, vectorised, no torch header.
#pragma once

#include "../plan.h"

namespace cwclip::cpu {

// sum |g|, sum g^2 (accumulated in float64) or max |g| of n elements; NaN if any is NaN, for every order.
// Deterministic: the order of additions depends on n alone, not on alignment, instruction set or thread.
double power_sum(const void* data, int64_t n, DType dtype, Order order);

// g <- coef * g; half precisions are widened to float32 and rounded once, to nearest even.
void scale(void* data, int64_t n, DType dtype, double coef);

}  // namespace cwclip::cpu
