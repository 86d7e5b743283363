#include "queue.h"

#include "../common/formula.h"
#include "strided.h"

#include <cmath>
#include <thread>

namespace cwclip::cpu {

Tiles::Tiles(const std::vector<Piece>& pieces, int64_t components) : first(components + 1, 0) {
  const auto tile_elements = [](const Piece& piece) { return kTileBytes / size_of(piece.dtype); };
  for (const Piece& piece : pieces) {
    bytes += piece.numel * size_of(piece.dtype);
    first[piece.component + 1] += (piece.numel + tile_elements(piece) - 1) / tile_elements(piece);
  }
  for (int64_t c = 0; c < components; ++c) first[c + 1] += first[c];
  tiles.resize(first[components]);
  std::vector<int64_t> place(first.begin(), first.end() - 1);
  for (size_t i = 0; i < pieces.size(); ++i) {
    const Piece& piece = pieces[i];
    for (int64_t start = 0; start < piece.numel; start += tile_elements(piece)) {
      const int64_t count = std::min(tile_elements(piece), piece.numel - start);
      tiles[place[piece.component]++] = {static_cast<int32_t>(i), piece.component, start, count};
    }
  }
  int64_t room = 0;
  for (size_t i = 0; i < tiles.size(); ++i) {
    const int64_t size = tiles[i].count * size_of(pieces[tiles[i].piece].dtype);
    if (size > room) {
      batches.push_back(static_cast<int64_t>(i));
      room = kTileBytes;
    }
    room -= size;
  }
  batches.push_back(static_cast<int64_t>(tiles.size()));
}

double combine(const double* partials, int64_t count, Order order) {
  double result = 0;
  for (int64_t i = 0; i < count; ++i) result = merge(result, partials[i], order);
  return result;
}

void Outcome::store_neutral(int64_t component) const {
  store_result(norms, component, 0, rule.wide);
  store_result(coefs, component, 1, rule.wide);
}

double Outcome::store(int64_t component, double sum) const {
  const double norm = rounded((order == Order::two ? std::sqrt(sum) : sum) * inverse, rule.wide);
  const double coef = rounded(coefficient(norm, rule.caps[component * rule.caps_stride], rule), rule.wide);
  store_result(norms, component, norm, rule.wide);
  store_result(coefs, component, coef, rule.wide);
  return coef;
}

double Outcome::coefficient_of(int64_t component) const { return load_result(coefs, component, rule.wide); }

ClipQueue::ClipQueue(const std::vector<Piece>& pieces, const Tiles& tiles, const Outcome& outcome, int threads)
    : pieces_(pieces), tiles_(tiles), outcome_(outcome),
      partials_(tiles.tiles.size()), measured_by_(tiles.tiles.size()), latest_(threads, kNone),
      earlier_(tiles.tiles.size()) {
  const int64_t components = static_cast<int64_t>(tiles.first.size()) - 1;
  unmeasured_ = std::make_unique<std::atomic<int64_t>[]>(components);
  int64_t unfinished = 0;
  for (int64_t c = 0; c < components; ++c) {
    const int64_t count = tiles.first[c + 1] - tiles.first[c];
    unmeasured_[c].store(count, std::memory_order_relaxed);
    unfinished += count > 0;
    outcome.store_neutral(c);  // what a component without gradient keeps
  }
  unfinished_.store(unfinished, std::memory_order_relaxed);
}

// Allocates nothing, so it can't throw while other threads wait for it.
void ClipQueue::work(int thread) noexcept {
  const int64_t count = static_cast<int64_t>(tiles_.batches.size()) - 1;
  for (int spins = 0;;) {
    if (scale_given_back(thread, thread + 1)) continue;
    if (next_.load(std::memory_order_relaxed) < count) {
      const int64_t batch = next_.fetch_add(1, std::memory_order_relaxed);
      if (batch >= count) continue;
      for (int64_t tile = tiles_.batches[batch]; tile < tiles_.batches[batch + 1]; ++tile) measure(tile, thread);
      continue;
    }
    if (scale_given_back(0, latest_.size())) continue;
    // What may still be given back is being measured by threads that run, so waiting for them ends.
    if (unfinished_.load(std::memory_order_acquire) == 0 && given_back_.load(std::memory_order_acquire) == 0) return;
    if (++spins % 64 == 0) std::this_thread::yield();
  }
}

void ClipQueue::measure(int64_t index, int thread) {
  const Tile& tile = tiles_.tiles[index];
  measured_by_[index] = thread;
  partials_[index] = power_sum(pieces_[tile.piece], tile.start, tile.count, outcome_.order);
  // The last to arrive sees every partial of the component.
  if (unmeasured_[tile.component].fetch_sub(1, std::memory_order_acq_rel) == 1) finish(tile.component);
}

void ClipQueue::finish(int64_t component) {
  const int64_t begin = tiles_.first[component], end = tiles_.first[component + 1];
  const double sum = combine(partials_.data() + begin, end - begin, outcome_.order);
  const double coef = outcome_.store(component, sum);
  if (!is_finite(sum)) found_nonfinite_.store(true, std::memory_order_relaxed);
  if (coef * outcome_.inverse != 1) {  // NaN included
    if (end - begin == 1) {
      scale_tile(begin);
    } else {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (int64_t tile = begin; tile < end; ++tile) {
        int64_t& latest = latest_[measured_by_[tile]];
        earlier_[tile] = latest;
        latest = tile;
      }
      given_back_.fetch_add(end - begin, std::memory_order_release);
    }
  }
  unfinished_.fetch_sub(1, std::memory_order_release);
}

// The tile that a thread was given last, taken off its list, or kNone. With the lock held.
int64_t ClipQueue::take(size_t thread) {
  const int64_t tile = latest_[thread];
  if (tile != kNone) {
    latest_[thread] = earlier_[tile];
    given_back_.fetch_sub(1, std::memory_order_release);
  }
  return tile;
}

bool ClipQueue::scale_given_back(size_t first_thread, size_t end_thread) {
  if (given_back_.load(std::memory_order_acquire) == 0) return false;
  int64_t tile = kNone;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (size_t thread = first_thread; thread < end_thread && tile == kNone; ++thread) tile = take(thread);
  }
  if (tile == kNone) return false;
  scale_tile(tile);
  return true;
}

void ClipQueue::scale_tile(int64_t index) const {
  const Tile& tile = tiles_.tiles[index];
  const double coef = outcome_.coefficient_of(tile.component);
  scale(pieces_[tile.piece], tile.start, tile.count, coef * outcome_.inverse, outcome_.erases(coef));
}

}  // namespace cwclip::cpu
