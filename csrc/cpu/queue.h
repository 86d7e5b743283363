// All work of a call as one queue of tiles, for any number of threads.
#pragma once

#include "../common/types.h"

#include <atomic>
#include <memory>
#include <mutex>

namespace cwclip::cpu {

// Small enough that a component of one tile is scaled out of L2, large enough that taking a tile costs nothing.
constexpr int64_t kTileBytes = 128 * 1024;

// A run of elements of one piece, of kTileBytes at the most.
struct Tile {
  int32_t piece;
  int32_t component;
  int64_t start, count;
};

// The tiles of component c are tiles[first[c]] up to tiles[first[c + 1]]. Tiles, and with them the order of every
// addition, depend on the gradients' sizes alone: the same bits whatever the number of threads.
struct Tiles {
  Tiles(const std::vector<Piece>& pieces, int64_t components);
  std::vector<Tile> tiles;
  std::vector<int64_t> first;
  // What a thread takes at a time is tiles[batches[i]] up to tiles[batches[i + 1]]: one tile, or many small ones.
  std::vector<int64_t> batches;
  int64_t bytes = 0;
};

// Sums the partials of one component in tile order.
double combine(const double* partials, int64_t count, Order order);

// Where a call's norms and coefficients go, and what they depend on beside the gradients.
struct Outcome {
  Order order;
  CallRule rule;
  double inverse;  // of the loss's scale
  void* norms;     // [K] double if rule.wide, else float
  void* coefs;     // likewise

  // Stores what a component without gradients has.
  void store_neutral(int64_t component) const;
  // Stores the norm and the coefficient of a component, from its power sum; returns the coefficient.
  double store(int64_t component, double sum) const;
  // The coefficient that was stored.
  double coefficient_of(int64_t component) const;
  // Whether a gradient times this coefficient is 0 even where it is inf or NaN.
  bool erases(double coef) const { return coef == 0 && rule.nonfinite == NonFinite::zero; }
};

// Norms, coefficients and scaling in one go. Up to `threads` threads, one or more, call work(), each with a number of its
// own below that; each returns when nothing is left for it to do. A component's norm is known as soon as its last tile is
// measured; whoever measured that then scales it if it is one tile, and otherwise gives every tile back to the thread
// that measured it. Threads scale what they were given, last tile first, before they measure more: that is when its bytes
// are still in cache, and in their own, since another thread's may be far away (an EPYC's next eight cores, 11 ms
// instead of 6 for 91 MB). Only when all is measured do they help each other out.
class ClipQueue {
 public:
  ClipQueue(const std::vector<Piece>& pieces, const Tiles& tiles, const Outcome& outcome, int threads);
  void work(int thread) noexcept;
  // Whether any component has an element that is inf or NaN; once all threads have returned.
  bool found_nonfinite() const { return found_nonfinite_.load(std::memory_order_relaxed); }

 private:
  static constexpr int64_t kNone = -1;

  void measure(int64_t tile, int thread);
  void finish(int64_t component);
  bool scale_given_back(size_t first_thread, size_t end_thread);
  int64_t take(size_t thread);
  void scale_tile(int64_t tile) const;

  const std::vector<Piece>& pieces_;
  const Tiles& tiles_;
  const Outcome outcome_;

  std::vector<double> partials_;
  std::unique_ptr<std::atomic<int64_t>[]> unmeasured_;  // tiles of each component
  std::atomic<int64_t> next_{0};                        // ticket: the next batch of tiles to measure
  std::atomic<int64_t> unfinished_;                     // components whose norm is not known yet
  std::atomic<bool> found_nonfinite_{false};

  std::vector<int> measured_by_;  // thread, for each tile
  std::atomic<int64_t> given_back_{0};  // tiles, looked at before the lock is taken
  std::mutex mutex_;
  std::vector<int64_t> latest_;   // for each thread, the tile that it was given last, or kNone
  std::vector<int64_t> earlier_;  // for each tile given back, the one that its thread was given before
};

}  // namespace cwclip::cpu
