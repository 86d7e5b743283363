// From power sum to coefficient, and how both are kept: the one copy for CPU and GPU of what
// cwclip_kernels/core/formula.py defines.
#pragma once

#include "types.h"

#include <limits>

#if defined(__CUDACC__)
#define CWCLIP_FORMULA __host__ __device__ __forceinline__
#else
#define CWCLIP_FORMULA inline
#endif

namespace cwclip {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

CWCLIP_FORMULA double rounded(double x, bool wide) { return wide ? x : static_cast<double>(static_cast<float>(x)); }

CWCLIP_FORMULA bool is_finite(double x) { return -kInfinity < x && x < kInfinity; }

// coefficients() for one component.
CWCLIP_FORMULA double coefficient(double norm, double cap, const CallRule& rule) {
  if (cap == kInfinity || norm == 0) return 1;
  if (!is_finite(norm) && rule.nonfinite != NonFinite::propagate) return rule.nonfinite == NonFinite::skip ? 1 : 0;
  if (!(cap >= 0)) return kNaN;
  const double padded = norm + rule.eps;
  return padded <= cap ? 1 : cap / padded;
}

// What undoes the loss's scale.
CWCLIP_FORMULA double inverse_of_scale(const CallRule& rule) { return rule.inverse == nullptr ? 1 : *rule.inverse; }

CWCLIP_FORMULA void store_result(void* results, uint32_t component, double value, bool wide) {
  if (wide) {
    static_cast<double*>(results)[component] = value;
  } else {
    static_cast<float*>(results)[component] = static_cast<float>(value);
  }
}

CWCLIP_FORMULA double load_result(const void* results, uint32_t component, bool wide) {
  return wide ? static_cast<const double*>(results)[component]
              : static_cast<double>(static_cast<const float*>(results)[component]);
}

}  // namespace cwclip
