#include "segments.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

namespace cwclip {
namespace {

std::string named(size_t index) { return "grads[" + std::to_string(index) + "]"; }

}  // namespace

Layout layout_of(const int64_t* sizes, const int64_t* strides, int64_t dims, size_t index) {
  std::vector<std::pair<int64_t, int64_t>> by_stride;  // stride, size
  for (int64_t d = 0; d < dims; ++d) {
    if (sizes[d] == 0) return {};
    if (sizes[d] > 1) by_stride.emplace_back(strides[d], sizes[d]);
  }
  if (by_stride.size() > kMaxDims) {
    throw std::runtime_error(named(index) + " has more than " + std::to_string(kMaxDims) + " dimensions");
  }
  std::sort(by_stride.begin(), by_stride.end());
  Layout layout;
  int64_t span = 0;
  for (const auto& [stride, size] : by_stride) {
    if (stride <= span) throw std::runtime_error(named(index) + " has several elements on one place in memory");
    span += stride * (size - 1);
    if (!layout.sizes.empty() && stride == layout.strides.back() * layout.sizes.back()) {
      layout.sizes.back() *= size;
    } else {
      layout.sizes.push_back(size);
      layout.strides.push_back(stride);
    }
  }
  const bool dense = layout.sizes.empty() || (layout.sizes.size() == 1 && layout.strides[0] == 1);
  return dense ? Layout{} : layout;
}

void check_distinct(const std::vector<Segment>& segments) {
  struct Place {
    const char *start, *end;
    size_t index;
  };
  std::vector<Place> places;
  places.reserve(segments.size());
  for (size_t i = 0; i < segments.size(); ++i) {
    const Segment& s = segments[i];
    if (s.numel == 0) continue;
    const char* const start = static_cast<const char*>(s.data);
    places.push_back({start, start + (s.layout.dense() ? s.numel * size_of(s.dtype) : 1), i});
  }
  std::sort(places.begin(), places.end(), [](const Place& a, const Place& b) { return a.start < b.start; });
  for (size_t i = 1; i < places.size(); ++i) {
    if (places[i - 1].end > places[i].start) {
      throw std::runtime_error(named(places[i - 1].index) + " and " + named(places[i].index) + " share memory");
    }
  }
}

}  // namespace cwclip
