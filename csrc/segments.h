// What is checked of gradients before anything is written, for every kernel alike.
#pragma once

#include "plan.h"

namespace cwclip {

// How the elements of grads[index] lie in memory: dimensions sorted by stride, and what lies seamlessly together joined.
// Throws std::runtime_error if several elements lie on one place.
Layout layout_of(const int64_t* sizes, const int64_t* strides, int64_t dims, size_t index);

// Throws std::runtime_error if two gradients of one device share memory: two threads must not scale one gradient, and
// nobody may scale it twice. Those with gaps may interleave, but not begin at the same place.
void check_distinct(const std::vector<Segment>& segments);

}  // namespace cwclip
