// The operators on CPU tensors; schemas in register.cpp.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace cwclip::cpu {

using torch::stable::Tensor;

// Pieces of gradients, and the component of each, are segments.h: Cuts.

// Clips in place. Returns norms and coefficients, [count] each, float64 if any gradient is, else float32. `inverse` (float64)
// undoes the loss's scale on the way, and found_inf (float32) becomes 1 if any element is inf or NaN.
std::tuple<Tensor, Tensor> clip_(std::vector<Tensor> grads, Tensor components, std::optional<Tensor> cuts,
                                 int64_t count, Tensor caps, std::optional<Tensor> inverse,
                                 std::optional<Tensor> found_inf, double norm_type, double eps, int64_t nonfinite);

// Returns the power sum of each component, float64 [count].
Tensor power_sums(std::vector<Tensor> grads, Tensor components, std::optional<Tensor> cuts, int64_t count,
                  double norm_type);

// g <- coef * g in place; coefs float64 [count].
void scale_(std::vector<Tensor> grads, Tensor components, std::optional<Tensor> cuts, Tensor coefs, bool zero_fill);

}  // namespace cwclip::cpu
