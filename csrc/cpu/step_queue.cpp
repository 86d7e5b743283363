#include "step_queue.h"

#include "strided.h"

#include <thread>

namespace cwclip::cpu {
namespace {

// Half of a small L2: the gradient of a component that one thread measures and updates, beside what streams through.
constexpr int64_t kAloneBytes = 512 * 1024;
constexpr int64_t kBatchBytes = 256 * 1024;
constexpr int64_t kRunTiles = 64;   // of kTileBytes: what is updated in one go
constexpr int64_t kShareTiles = 4;  // at the least

}  // namespace

StepOrder::StepOrder(const Tiles& tiles, const std::vector<Piece>& pieces) {
  int64_t room = 0;
  for (int64_t c = 0; c + 1 < static_cast<int64_t>(tiles.first.size()); ++c) {
    int64_t bytes = 0;
    for (int64_t i = tiles.first[c]; i < tiles.first[c + 1]; ++i) {
      bytes += tiles.tiles[i].count * size_of(pieces[tiles.tiles[i].piece].dtype);
    }
    if (bytes == 0) continue;
    if (bytes > kAloneBytes) {
      shared.push_back(c);
      continue;
    }
    const int64_t place = static_cast<int64_t>(alone.size());
    if (batches.empty() || bytes > room) {
      batches.emplace_back(place, place);
      room = kBatchBytes;
    }
    room -= bytes;
    alone.push_back(c);
    batches.back().second = place + 1;
  }
}

StepQueue::StepQueue(const std::vector<Piece>& pieces, const Tiles& tiles, const StepOrder& order,
                     const std::vector<StepGradient>& gradients, const std::vector<StepTarget>& targets,
                     const Outcome& outcome, const double* factors, bool zero_fill, bool skips, int threads)
    : pieces_(pieces), tiles_(tiles), order_(order), gradients_(gradients), targets_(targets), outcome_(outcome),
      factors_(factors), zero_fill_(zero_fill), skips_(skips), threads_(threads), partials_(tiles.tiles.size()),
      shared_(std::make_unique<Shared[]>(order.shared.size())), measured_by_(order.shared.size() * threads),
      updated_(std::make_unique<std::atomic<bool>[]>(order.shared.size() * threads)) {
  for (size_t i = 0; i < order.shared.size(); ++i) {
    shared_[i].unmeasured.store(shares_of(order.shared[i]), std::memory_order_relaxed);
    for (int share = 0; share < threads; ++share) {
      measured_by_[i * threads + share] = share;
      updated_[i * threads + share].store(false, std::memory_order_relaxed);
    }
  }
  if (factors != nullptr) return;
  for (int64_t c = 0; c + 1 < static_cast<int64_t>(tiles.first.size()); ++c) outcome.store_neutral(c);
}

// Allocates nothing, so it can't throw while other threads wait for it.
void StepQueue::work(int thread) noexcept {
  for (size_t i = 0; i < order_.shared.size(); ++i) step_together(i, thread);
  for (size_t i; (i = next_batch_.fetch_add(1, std::memory_order_relaxed)) < order_.batches.size();) {
    for (int64_t j = order_.batches[i].first; j < order_.batches[i].second; ++j) step_alone(order_.alone[j]);
  }
}

int StepQueue::shares_of(int64_t component) const {
  const int64_t tiles = tiles_.first[component + 1] - tiles_.first[component];
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads_, tiles / kShareTiles)));
}

void StepQueue::step_alone(int64_t component) {
  const int64_t begin = tiles_.first[component], end = tiles_.first[component + 1];
  if (factors_ == nullptr) {
    measure(begin, end);
    finish(component);
  }
  update(begin, end);
}

void StepQueue::step_together(size_t index, int thread) {
  const int64_t component = order_.shared[index], first = tiles_.first[component];
  const int64_t count = tiles_.first[component + 1] - first;
  const int shares = shares_of(component);
  const auto begin_of = [&](int share) { return first + count * share / shares; };
  int* const measured_by = measured_by_.data() + index * threads_;
  std::atomic<bool>* const updated = updated_.get() + index * threads_;
  if (factors_ == nullptr) {
    Shared& own = shared_[index];
    bool has_measured = false;
    for (int share; (share = own.measuring.fetch_add(1, std::memory_order_relaxed)) < shares;) {
      has_measured = true;
      measured_by[share] = thread;
      measure(begin_of(share), begin_of(share + 1));
      // The last to arrive sees every partial of the component.
      if (own.unmeasured.fetch_sub(1, std::memory_order_acq_rel) == 1) {
        finish(component);
        own.known.store(true, std::memory_order_release);
      }
    }
    if (!has_measured) return;  // others do, and will update it
    for (int spins = 0; !own.known.load(std::memory_order_acquire);) {
      if (++spins % 64 == 0) std::this_thread::yield();
    }
  }
  for (const bool is_own : {true, false}) {
    for (int share = shares - 1; share >= 0; --share) {
      if ((measured_by[share] == thread) != is_own) continue;
      if (!updated[share].exchange(true, std::memory_order_relaxed)) update(begin_of(share), begin_of(share + 1));
    }
  }
}

void StepQueue::measure(int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const Tile& tile = tiles_.tiles[i];
    partials_[i] = power_sum(pieces_[tile.piece], tile.start, tile.count, outcome_.order);
  }
}

void StepQueue::finish(int64_t component) {
  const int64_t begin = tiles_.first[component], end = tiles_.first[component + 1];
  outcome_.store(component, combine(partials_.data() + begin, end - begin, outcome_.order));
}

// The last tiles first, whose gradients were read last; in runs of up to kRunTiles of one piece.
void StepQueue::update(int64_t begin, int64_t end) {
  if (skips_ || begin == end) return;
  const int64_t component = tiles_.tiles[begin].component;
  double factor;
  bool erases;
  if (factors_ == nullptr) {
    const double coef = outcome_.coefficient_of(component);
    factor = coef * outcome_.inverse;
    erases = outcome_.erases(coef);
  } else {
    factor = factors_[component];
    erases = zero_fill_ && factor == 0;
  }
  while (end > begin) {
    int64_t at = end - 1;
    const Tile& last = tiles_.tiles[at];
    while (at > begin && end - at < kRunTiles && tiles_.tiles[at - 1].piece == last.piece) --at;
    const Tile& first = tiles_.tiles[at];
    update_run(pieces_[last.piece], first.start, last.start + last.count - first.start, factor, erases);
    end = at;
  }
}

void StepQueue::update_run(const Piece& piece, int64_t start, int64_t count, double factor, bool erases) const {
  const StepGradient& gradient = gradients_[piece.gradient];
  const StepTarget& target = targets_[piece.gradient];
  AdamW numbers = target.numbers;
  numbers.factor *= factor;
  numbers.erases = erases;
  step(piece, start, count, gradient.types, {target.p, static_cast<char*>(piece.data), target.m, target.v, target.w},
       numbers);
}

}  // namespace cwclip::cpu
