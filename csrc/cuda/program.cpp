#include "program.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace cwclip::cuda {
namespace {

int64_t aligned(int64_t bytes) { return (bytes + 15) / 16 * 16; }

template <class T>
void append(std::string& bytes, const T* values, size_t count) {
  bytes.append(reinterpret_cast<const char*>(values), count * sizeof(T));
}

// Offset, dims, then size and stride of each, innermost first; where it begins.
int32_t append_layout(const Piece& piece, std::vector<int64_t>& layouts) {
  const Strides& strides = piece.strides;
  const size_t start = layouts.size();
  layouts.push_back(piece.offset);
  layouts.push_back(static_cast<int64_t>(strides.sizes.size()));
  for (size_t d = 0; d < strides.sizes.size(); ++d) {
    layouts.push_back(strides.sizes[d]);
    layouts.push_back(strides.steps[d]);
  }
  return static_cast<int32_t>(start);
}

// Whether each component is small: one piece without gaps, of a few KB.
std::vector<bool> find_small(const std::vector<Piece>& pieces, int64_t components) {
  std::vector<int64_t> bytes(components);
  std::vector<bool> small(components, true);
  for (const Piece& piece : pieces) {
    if (piece.numel == 0) continue;
    const bool first = bytes[piece.component] == 0;
    bytes[piece.component] += piece.numel * size_of(piece.dtype);
    if (!first || !piece.strides.dense() || bytes[piece.component] > kSmallBytes) small[piece.component] = false;
  }
  return small;
}

// The pieces that have elements, component by component, so that a launch's tiles and addresses are one run each; those
// of small components last.
std::vector<int32_t> in_order(const std::vector<Piece>& pieces, const std::vector<bool>& small) {
  std::vector<int32_t> order;
  for (size_t i = 0; i < pieces.size(); ++i) {
    if (pieces[i].numel > 0) order.push_back(static_cast<int32_t>(i));
  }
  const auto key = [&](int32_t i) { return std::pair(small[pieces[i].component], pieces[i].component); };
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return key(a) < key(b); });
  return order;
}

// Whose address each run of pieces needs: pieces of one gradient that follow one another share it.
std::vector<int32_t> addresses_of(const std::vector<Piece>& pieces, const std::vector<int32_t>& order) {
  std::vector<int32_t> gradients;
  for (const int32_t i : order) {
    if (gradients.empty() || gradients.back() != pieces[i].gradient) gradients.push_back(pieces[i].gradient);
  }
  return gradients;
}

}  // namespace

Program make_program(const std::vector<Piece>& pieces, int32_t gradients, int64_t components, std::string& tables) {
  const std::vector<bool> small = find_small(pieces, components);
  const std::vector<int32_t> order = in_order(pieces, small), gradient_of = addresses_of(pieces, order);
  const bool few = gradient_of.size() <= kFewAddresses;
  const int32_t capacity = few ? kFewAddresses : kManyAddresses;
  std::vector<Tile> tiles;
  std::vector<Span> spans(components);
  std::vector<int64_t> layouts;
  std::vector<Range> ranges;
  int32_t segment = -1;
  int64_t bytes = 0;
  uint32_t small_begin = 0;
  for (const int32_t i : order) {
    const Piece& piece = pieces[i];
    const uint32_t begin = static_cast<uint32_t>(tiles.size());
    if (segment < 0 || gradient_of[segment] != piece.gradient) {
      if (++segment % capacity == 0) ranges.push_back({begin, begin, begin, segment, segment, 0, 0, 0});
    }
    const int32_t layout = piece.strides.dense() ? -1 : append_layout(piece, layouts);
    const int64_t step = kTileBytes / size_of(piece.dtype), offset = piece.strides.dense() ? piece.offset : 0;
    for (int64_t start = 0; start < piece.numel; start += step) {
      tiles.push_back({offset + start, static_cast<int32_t>(std::min(step, piece.numel - start)), segment,
                       piece.component, piece.dtype, layout, 0});
    }
    if (tiles.size() > UINT32_MAX - (1u << 20)) throw std::runtime_error("grads: more than 128 TB on one device");
    Range& range = ranges.back();
    range.tile_end = static_cast<uint32_t>(tiles.size());
    if (!small[piece.component]) small_begin = range.small_begin = range.tile_end;
    range.segment_end = segment + 1;
    Span& span = spans[piece.component];
    if (span.count == 0) span.first = begin;
    span.count += range.tile_end - begin;
    bytes += piece.numel * size_of(piece.dtype);
  }
  if (ranges.empty()) ranges.push_back({});  // one launch all the same: components without elements have results too
  for (Tile& tile : tiles) tile.of = static_cast<int32_t>(spans[tile.component].count);
  for (size_t i = 0; i < ranges.size(); ++i) {
    ranges[i].table = static_cast<uint32_t>(i);
    ranges[i].tables = static_cast<uint32_t>(ranges.size());
  }

  Program p = {};
  p.tiles = static_cast<uint32_t>(tiles.size());
  p.components = static_cast<uint32_t>(components);
  for (const Span& span : spans) {
    p.split += span.count > 1;
    p.empty += span.count == 0;
  }
  p.small_begin = small_begin;
  p.bytes = bytes;
  p.gradients = gradients;
  p.few = few;
  p.gaps = !layouts.empty();

  tables.clear();
  append(tables, tiles.data(), tiles.size());
  p.layouts_at = static_cast<int64_t>(tables.size());
  append(tables, layouts.data(), layouts.size());
  p.spans_at = static_cast<int64_t>(tables.size());
  append(tables, spans.data(), spans.size());

  p.sum_tickets_at = aligned(sizeof(Counters));
  p.done_at = p.sum_tickets_at + aligned(4 * static_cast<int64_t>(ranges.size()));
  p.list_at = p.done_at + aligned(4 * components);
  p.partials_at = p.list_at + aligned(4 * int64_t{p.tiles});
  p.workspace_bytes = p.partials_at + 8 * int64_t{p.tiles};

  p.ranges = std::move(ranges);
  p.gradient_of = gradient_of;
  return p;
}

}  // namespace cwclip::cuda
