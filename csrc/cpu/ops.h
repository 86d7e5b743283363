// The operators on CPU tensors; schemas in register.cpp.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <tuple>
#include <vector>

namespace cwclip::cpu {

using torch::stable::Tensor;

// Clips in place. Returns norms and coefficients, [count] each, float64 if any gradient is, else float32.
std::tuple<Tensor, Tensor> clip_(std::vector<Tensor> grads, Tensor components, int64_t count, Tensor caps,
                                 double norm_type, double eps, int64_t nonfinite);

// Returns the power sum of each component, float64 [count].
Tensor power_sums(std::vector<Tensor> grads, Tensor components, int64_t count, double norm_type);

// g <- coef * g in place; coefs float64 [count].
void scale_(std::vector<Tensor> grads, Tensor components, Tensor coefs, bool zero_fill);

}  // namespace cwclip::cpu
