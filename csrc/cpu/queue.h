// All of a call's work as one queue of tiles, taken by as many threads as come.
#pragma once

#include "../plan.h"

#include <atomic>
#include <memory>
#include <mutex>

namespace cwclip::cpu {

// Small enough that a component of one tile is scaled out of L2, large enough that taking a tile costs nothing.
constexpr int64_t kTileBytes = 128 * 1024;

// A run of elements of one segment, of kTileBytes at the most.
struct Tile {
  int32_t segment;
  int32_t component;
  int64_t start, count;
};

// The tiles of component c are tiles[first[c]] up to tiles[first[c + 1]]. Tiles, and with them the order of every
// addition, depend on the gradients' sizes alone: the same bits whatever the number of threads.
struct Tiles {
  Tiles(const std::vector<Segment>& segments, int64_t components);
  std::vector<Tile> tiles;
  std::vector<int64_t> first;
  int64_t bytes = 0;
};

// Sums the partials of one component in tile order.
double combine(const double* partials, int64_t count, Order order);

// Norms, coefficients and scaling in one go. Any number of threads, from one up, call work(); each returns when
// nothing is left for it to do. A component's norm is known as soon as its last tile is measured; whoever measured
// that then scales it if it is one tile, and otherwise opens it for all threads, which finish open components, last
// tile first, before they measure new ones: that is when its bytes are still in cache.
class ClipQueue {
 public:
  ClipQueue(const std::vector<Segment>& segments, const Tiles& tiles, Order order, const Rule& rule, double* norms,
            double* coefs);
  void work() noexcept;

 private:
  struct Open {
    int64_t first, next;  // tiles [first, next) are still to be scaled
    double coef;
  };

  void measure(int64_t tile);
  void finish(int64_t component);
  bool scale_open_tile();
  void scale_tile(const Tile& tile, double coef) const;

  const std::vector<Segment>& segments_;
  const Tiles& tiles_;
  const Order order_;
  const Rule rule_;
  double* const norms_;
  double* const coefs_;

  std::vector<double> partials_;
  std::unique_ptr<std::atomic<int64_t>[]> unmeasured_;  // tiles of each component
  std::atomic<int64_t> next_{0};                        // ticket: the next tile to measure
  std::atomic<int64_t> unfinished_;                     // components whose norm is not known yet

  std::atomic<int64_t> open_count_{0};  // looked at before the lock is taken
  std::mutex mutex_;
  std::vector<Open> open_;
};

}  // namespace cwclip::cpu
