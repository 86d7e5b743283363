// Power sums and scaling of one contiguous run of elements. Single-threaded, vectorised, no torch header.
#pragma once

#include "../../common/types.h"

namespace cwclip::cpu {

// sum |g|, sum g^2 or max |g| of n elements, good to 1e-6 (1e-14 for float64); NaN if any is NaN, for every order.
// Deterministic: the order of additions depends on n alone, not on alignment or thread.
double power_sum(const void* data, int64_t n, DType dtype, Order order);

// g <- coef * g; half precisions are widened to float32 and rounded once, to nearest even.
void scale(void* data, int64_t n, DType dtype, double coef);

// The numbers of a parameter's step in cwclip_kernels/core/adamw.py, put together.
struct AdamW {
  double factor;  // of the gradient, with the sign of ``maximize``
  double decay;   // 1 - lr * weight_decay
  double beta1, beta2;
  double size;    // lr / (1 - beta1^t) * root, where root = sqrt(1 - beta2^t)
  double eps;     // eps * root
  bool erases;    // whether the gradient counts as 0, inf and NaN too
};

// Where the run of a parameter, its gradient and its state begins; w null without amsgrad.
struct AdamWRun {
  char* p;
  const char* g;
  char *m, *v, *w;
};

// A dtype of parameters with those of its gradients and states: each the same, or float32.
struct AdamWTypes {
  DType parameter, gradient, state;
  bool served() const {
    return (gradient == parameter || gradient == DType::f32) && (state == parameter || state == DType::f32) &&
           (parameter != DType::f64 || (gradient == parameter && state == parameter));
  }
};

// One step of n elements.
void adamw(const AdamWRun& run, int64_t n, const AdamWTypes& types, const AdamW& numbers);

// The kernels of one instruction set for one dtype; kernels_isa.h has the code of all of them.
struct Kernels {
  double (*power_sum)(const char*, int64_t, Order);
  void (*scale)(char*, int64_t, double);
  // For gradients of this dtype or float32, and states of this dtype or float32.
  void (*adamw[2][2])(const AdamWRun&, int64_t, const AdamW&);
};

// Four of them, by DType.
namespace baseline { extern const Kernels kernels[4]; }
namespace avx2 { extern const Kernels kernels[4]; }
namespace avx512 { extern const Kernels kernels[4]; }

}  // namespace cwclip::cpu
