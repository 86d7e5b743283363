// Gradients, how their elements lie in memory, and the pieces of them that belong to components.
#pragma once

#include "types.h"

namespace cwclip {

// Dimensions sorted by stride, and those that follow one another without a gap as one; `index` is for error messages.
// Throws std::runtime_error if several elements lie on one place.
Strides strides_of(const int64_t* sizes, const int64_t* strides, int64_t dims, size_t index);

// Sizes and strides of a gradient, as torch keeps them.
struct Shape {
  const int64_t *sizes, *strides;
  int64_t dims;
};

// Which pieces of gradients belong to which components, as Bucket.cuts of cwclip_kernels/core/bucket.py writes it.
struct Cuts {
  const int64_t* components;  // [pieces]
  int64_t pieces;
  const int64_t* numbers;  // of each piece its gradient, how many dims are cut, and of each of these dim, start and size;
  int64_t length;          // null if pieces are whole gradients, one for each
};

// Cuts gradients into pieces for `count` components. Throws std::runtime_error if they don't fit.
std::vector<Piece> cut(std::vector<Piece> gradients, const std::vector<Shape>& shapes, const Cuts& cuts, int64_t count);

// Whether two gradients of one device share memory. Those with gaps may interleave, but not begin at the same place.
bool share_memory(const std::vector<Piece>& pieces);

}  // namespace cwclip
