// From power sum to coefficient, and how both are kept.
#pragma once

#include "elements.cuh"
#include "tables.h"

namespace cwclip::cuda {

CWCLIP_DEVICE double rounded(double x, bool wide) { return wide ? x : static_cast<double>(static_cast<float>(x)); }

CWCLIP_DEVICE bool is_finite(double x) { return magnitude(x) < double_of(0x7ff0000000000000u); }

// cwclip_kernels/formula.py: coefficients(), for one component.
CWCLIP_DEVICE double coefficient(double norm, double cap, const Rule& rule) {
  if (cap == double_of(0x7ff0000000000000u) || norm == 0) return 1;
  if (!is_finite(norm) && rule.nonfinite != NonFinite::propagate) return rule.nonfinite == NonFinite::skip ? 1 : 0;
  if (!(cap >= 0)) return double_of(0x7ff8000000000000u);
  const double padded = norm + rule.eps;
  return padded <= cap ? 1 : quotient(cap, padded);
}

// What undoes the loss's scale.
CWCLIP_DEVICE double inverse_of_scale(const Rule& rule) { return rule.inverse == nullptr ? 1 : *rule.inverse; }

CWCLIP_DEVICE void store_result(void* results, uint32_t component, double value, bool wide) {
  if (wide) {
    static_cast<double*>(results)[component] = value;
  } else {
    static_cast<float*>(results)[component] = static_cast<float>(value);
  }
}

CWCLIP_DEVICE double load_result(const void* results, uint32_t component, bool wide) {
  return wide ? static_cast<const double*>(results)[component]
              : static_cast<double>(static_cast<const float*>(results)[component]);
}

}  // namespace cwclip::cuda
