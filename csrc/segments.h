// What is checked of gradients before anything is written, for every kernel alike.
#pragma once

#include "plan.h"

#include <vector>

namespace cwclip {

// How the elements of grads[index] lie in memory: dimensions sorted by stride, and what lies seamlessly together joined.
// Throws std::runtime_error if several elements lie on one place.
Layout layout_of(const int64_t* sizes, const int64_t* strides, int64_t dims, size_t index);

// Sizes and strides of a gradient, as its owner keeps them.
struct Shape {
  const int64_t *sizes, *strides;
  int64_t dims;
};

// Which pieces of gradients belong to which components, as cwclip_kernels/plan.py writes it (Bucket.cuts).
struct Cuts {
  const int64_t* components;  // [pieces]
  int64_t pieces;
  const int64_t* numbers;  // of each piece its gradient, how many dims are cut, and of each of these dim, start and size;
  int64_t length;          // null if pieces are whole gradients, one for each
};

// Cuts gradients into pieces for `count` components. Throws std::runtime_error if they don't fit.
std::vector<Segment> cut(std::vector<Segment> gradients, const std::vector<Shape>& shapes, const Cuts& cuts,
                         int64_t count);

// Throws std::runtime_error if two gradients of one device share memory: two threads must not scale one gradient, and
// nobody may scale it twice. Those with gaps may interleave, but not begin at the same place.
void check_distinct(const std::vector<Segment>& segments);

}  // namespace cwclip
