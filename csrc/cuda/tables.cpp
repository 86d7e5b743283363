#include "tables.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>

namespace cwclip::cuda {
namespace {

int64_t aligned(int64_t bytes) { return (bytes + 15) / 16 * 16; }

template <class T>
void append(std::string& bytes, const T* values, size_t count) {
  bytes.append(reinterpret_cast<const char*>(values), count * sizeof(T));
}

// Dims, then size and stride of each, innermost first; where it begins.
int32_t append_layout(const Layout& layout, std::vector<int64_t>& layouts) {
  const size_t start = layouts.size();
  layouts.push_back(static_cast<int64_t>(layout.sizes.size()));
  for (size_t d = 0; d < layout.sizes.size(); ++d) {
    layouts.push_back(layout.sizes[d]);
    layouts.push_back(layout.strides[d]);
  }
  return static_cast<int32_t>(start);
}

// The gradients that have elements, component by component, so that a launch's tiles and addresses are one run each.
std::vector<int32_t> in_order(const std::vector<Segment>& gradients) {
  std::vector<int32_t> order;
  for (size_t i = 0; i < gradients.size(); ++i) {
    if (gradients[i].numel > 0) order.push_back(static_cast<int32_t>(i));
  }
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return gradients[a].component < gradients[b].component; });
  return order;
}

}  // namespace

void write_program(const std::vector<Segment>& gradients, int64_t components, std::string& tables,
                   std::string& program) {
  const std::vector<int32_t> order = in_order(gradients);
  const bool few = order.size() <= kFewAddresses;
  const size_t capacity = few ? kFewAddresses : kManyAddresses;
  std::vector<Tile> tiles;
  std::vector<uint32_t> tiles_of(components + 1);  // by component, then its running total
  std::vector<int64_t> layouts;
  std::vector<Range> ranges;
  for (size_t s = 0; s < order.size(); ++s) {
    const Segment& gradient = gradients[order[s]];
    const uint32_t begin = static_cast<uint32_t>(tiles.size());
    if (s % capacity == 0) ranges.push_back({begin, begin, static_cast<int32_t>(s), static_cast<int32_t>(s), 0, 0, 0});
    const int32_t layout = gradient.layout.dense() ? -1 : append_layout(gradient.layout, layouts);
    const int64_t step = kTileBytes / size_of(gradient.dtype);
    for (int64_t start = 0; start < gradient.numel; start += step) {
      tiles.push_back({start, static_cast<int32_t>(std::min(step, gradient.numel - start)), static_cast<int32_t>(s),
                       gradient.component, gradient.dtype, layout, 0});
    }
    if (tiles.size() > UINT32_MAX - (1u << 20)) throw std::runtime_error("grads: more than 128 TB on one device");
    ranges.back().tile_end = static_cast<uint32_t>(tiles.size());
    ranges.back().segment_end = static_cast<int32_t>(s) + 1;
    tiles_of[gradient.component] += ranges.back().tile_end - begin;
  }
  if (ranges.empty()) ranges.push_back({});  // one launch all the same: components without elements have results too
  for (Tile& tile : tiles) tile.of = static_cast<int32_t>(tiles_of[tile.component]);
  for (size_t i = 0; i < ranges.size(); ++i) {
    ranges[i].table = static_cast<uint32_t>(i);
    ranges[i].tables = static_cast<uint32_t>(ranges.size());
  }

  Program p = {};
  p.tiles = static_cast<uint32_t>(tiles.size());
  p.components = static_cast<uint32_t>(components);
  p.measured = static_cast<uint32_t>(components - std::count(tiles_of.begin(), tiles_of.end() - 1, 0u));
  p.launches = static_cast<uint32_t>(ranges.size());
  p.gradients = static_cast<int32_t>(gradients.size());
  p.segments = static_cast<int32_t>(order.size());
  p.few = few;
  p.gaps = !layouts.empty();

  std::exclusive_scan(tiles_of.begin(), tiles_of.end(), tiles_of.begin(), 0u);
  tables.clear();
  append(tables, tiles.data(), tiles.size());
  p.layouts_at = static_cast<int64_t>(tables.size());
  append(tables, layouts.data(), layouts.size());
  p.spans_at = static_cast<int64_t>(tables.size());
  append(tables, tiles_of.data(), tiles_of.size());
  p.tables_bytes = static_cast<int64_t>(tables.size());

  p.sum_tickets_at = aligned(sizeof(Counters));
  p.done_at = p.sum_tickets_at + aligned(4 * int64_t{p.launches});
  p.list_at = p.done_at + aligned(4 * components);
  p.partials_at = p.list_at + aligned(4 * int64_t{p.tiles});
  p.workspace_bytes = p.partials_at + 8 * int64_t{p.tiles};

  program.clear();
  append(program, &p, 1);
  append(program, ranges.data(), ranges.size());
  append(program, order.data(), order.size());
}

}  // namespace cwclip::cuda
