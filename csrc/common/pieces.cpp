#include "pieces.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

namespace cwclip {
namespace {

std::string named(size_t index) { return "grads[" + std::to_string(index) + "]"; }

// Reads one piece of a gradient from the numbers of the cuts, and moves past it.
Piece piece_of(const std::vector<Piece>& gradients, const std::vector<Shape>& shapes, const int64_t** numbers,
               const int64_t* end) {
  const auto next = [&] {
    if (*numbers == end) throw std::runtime_error("cuts: too short");
    return *(*numbers)++;
  };
  const int64_t gradient = next();
  if (gradient < 0 || gradient >= static_cast<int64_t>(gradients.size())) {
    throw std::runtime_error("cuts: there is no gradient " + std::to_string(gradient));
  }
  Piece piece = gradients[gradient];
  piece.gradient = static_cast<int32_t>(gradient);
  const int64_t dims = next();
  if (dims == 0) return piece;
  const Shape& shape = shapes[gradient];
  if (shape.dims > static_cast<int64_t>(kMaxDims)) throw std::runtime_error(named(gradient) + " has too many dimensions");
  int64_t sizes[kMaxDims];
  std::copy(shape.sizes, shape.sizes + shape.dims, sizes);
  for (int64_t i = 0; i < dims; ++i) {
    const int64_t dim = next(), start = next(), size = next();
    if (dim < 0 || dim >= shape.dims || start < 0 || size < 0 || start > sizes[dim] || size > sizes[dim] - start) {
      throw std::runtime_error("cuts: a piece lies outside of " + named(gradient));
    }
    sizes[dim] = size;
    piece.offset += start * shape.strides[dim];
  }
  piece.numel = 1;
  for (int64_t d = 0; d < shape.dims; ++d) piece.numel *= sizes[d];
  piece.strides = strides_of(sizes, shape.strides, shape.dims, gradient);
  return piece;
}

}  // namespace

Strides strides_of(const int64_t* sizes, const int64_t* strides, int64_t dims, size_t index) {
  std::vector<std::pair<int64_t, int64_t>> by_stride;  // stride, size
  for (int64_t d = 0; d < dims; ++d) {
    if (sizes[d] == 0) return {};
    if (sizes[d] > 1) by_stride.emplace_back(strides[d], sizes[d]);
  }
  if (by_stride.size() > kMaxDims) {
    throw std::runtime_error(named(index) + " has more than " + std::to_string(kMaxDims) + " dimensions");
  }
  std::sort(by_stride.begin(), by_stride.end());
  Strides result;
  int64_t span = 0;
  for (const auto& [stride, size] : by_stride) {
    if (stride <= span) throw std::runtime_error(named(index) + " has several elements on one place in memory");
    span += stride * (size - 1);
    if (!result.sizes.empty() && stride == result.steps.back() * result.sizes.back()) {
      result.sizes.back() *= size;
    } else {
      result.sizes.push_back(size);
      result.steps.push_back(stride);
    }
  }
  const bool dense = result.sizes.empty() || (result.sizes.size() == 1 && result.steps[0] == 1);
  return dense ? Strides{} : result;
}

std::vector<Piece> cut(std::vector<Piece> gradients, const std::vector<Shape>& shapes, const Cuts& cuts,
                         int64_t count) {
  std::vector<Piece> pieces;
  if (cuts.numbers == nullptr) {
    if (cuts.pieces != static_cast<int64_t>(gradients.size())) {
      throw std::runtime_error("components: expected one for each of the " + std::to_string(gradients.size()) + " gradients");
    }
    pieces = std::move(gradients);
    for (size_t i = 0; i < pieces.size(); ++i) pieces[i].gradient = static_cast<int32_t>(i);
  } else {
    const int64_t *numbers = cuts.numbers, *const end = numbers + cuts.length;
    // One number too few is found out on the way; this is against a list of pieces that is longer than memory.
    if (cuts.pieces > cuts.length) throw std::runtime_error("cuts: too short");
    pieces.reserve(cuts.pieces);
    while (static_cast<int64_t>(pieces.size()) < cuts.pieces) {
      pieces.push_back(piece_of(gradients, shapes, &numbers, end));
    }
    if (numbers != end) throw std::runtime_error("cuts: too long");
  }
  for (size_t i = 0; i < pieces.size(); ++i) {
    const int64_t component = cuts.components[i];
    if (component < 0 || component >= count) {
      throw std::runtime_error("components[" + std::to_string(i) + "] is outside [0, " + std::to_string(count) + ")");
    }
    pieces[i].component = static_cast<int32_t>(component);
  }
  return pieces;
}

bool share_memory(const std::vector<Piece>& pieces) {
  std::vector<std::pair<const char*, const char*>> spans;
  spans.reserve(pieces.size());
  for (const Piece& piece : pieces) {
    if (piece.numel == 0) continue;
    const char* const start = static_cast<const char*>(piece.data);
    spans.emplace_back(start, start + (piece.strides.dense() ? piece.numel * size_of(piece.dtype) : 1));
  }
  std::sort(spans.begin(), spans.end());
  for (size_t i = 1; i < spans.size(); ++i) {
    if (spans[i - 1].second > spans[i].first) return true;
  }
  return false;
}

}  // namespace cwclip
