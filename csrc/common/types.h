// What a call works on, in plain structs without a torch header: shared by all kernels.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace cwclip {

enum class DType : int32_t { f32, bf16, f16, f64 };

constexpr int64_t size_of(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}

// What happens to a component whose norm is inf or NaN, numbered as in POLICIES of cwclip_kernels/core/formula.py.
// "error" is decided in Python, between two calls.
enum class NonFinite : int64_t { propagate = 0, zero = 1, skip = 2 };

// Order of the norm: the sum of |g|, the sum of g^2, the largest |g|.
enum class Order : int32_t { one, two, inf };

constexpr std::size_t kMaxDims = 64;  // torch's own limit for most operators

// A tensor with gaps between its elements: the size of each dimension and the elements from one index to the next,
// innermost dimension first. Empty for a dense tensor, whose elements can be taken in memory order: no result depends on
// which index they belong to.
struct Strides {
  std::vector<int64_t> sizes, steps;
  bool dense() const { return sizes.empty(); }
};

// A gradient, or the part of one that belongs to one component.
struct Piece {
  void* data;
  int64_t numel;
  DType dtype;
  int32_t component;
  Strides strides;
  int32_t gradient = 0;  // which one
  int64_t offset = 0;    // of its first element from the gradient's, in elements
};

// What is the same in call after call about how norms become coefficients.
struct ClipRule {
  static constexpr const char* kCapsule = "cwclip_kernels.rule";
  Order order;
  double eps;
  NonFinite nonfinite;
};

// A rule together with what a call brings.
struct CallRule {
  const double* caps;     // one, or one for each component
  int64_t caps_stride;    // 0 if all components share one
  const double* inverse;  // of the loss's scale, taken out of norms and gradients; null where there is none
  double eps;
  NonFinite nonfinite;
  bool wide;  // norms and coefficients are rounded to float64 rather than float32
};

}  // namespace cwclip
