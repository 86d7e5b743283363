// AdamW's step of all parameters of a bucket as one queue: norms, coefficients and updates, for any number of threads.
#pragma once

#include "queue.h"
#include "simd/kernels.h"

#include <atomic>
#include <memory>
#include <utility>

namespace cwclip::cpu {

// What is static about the parameters of a bucket.
struct StepGradient {
  AdamWTypes types;
  bool has_maximum;     // whether there is w
  bool time_is_double;  // whether t is float64
  int32_t rule;         // the param group's hyperparameters
};

// In which order components are taken: first those that don't fit into one thread's cache, by all threads together; then
// the others, a batch at a time.
struct StepOrder {
  StepOrder(const Tiles& tiles, const std::vector<Piece>& pieces);
  std::vector<int64_t> shared;                      // components
  std::vector<int64_t> alone;                       // components
  std::vector<std::pair<int64_t, int64_t>> batches;  // ranges of `alone`
};

// What a call brings for each gradient: where its parameter and state begin, and the numbers of its step.
struct StepTarget {
  char *p, *m, *v, *w;
  AdamW numbers;  // its factor is the sign
};

// Up to `threads` threads, one or more, call work(), each with a number of its own below that; each returns when nothing
// is left for it to do. A component of up to kAloneBytes is measured and updated by one thread, out of its L2. A larger
// one is divided into a contiguous share for each thread: long runs, since four or five streams in short ones cost
// half the memory's speed. Whoever measured a share updates it, last read first, when the norm is known; a thread only
// waits for shares that are being measured by others, so that waiting ends however few threads run.
class StepQueue {
 public:
  // `factors` [K] are the coefficients, times what undoes the loss's scale; null if they are to be worked out here.
  StepQueue(const std::vector<Piece>& pieces, const Tiles& tiles, const StepOrder& order,
            const std::vector<StepGradient>& gradients, const std::vector<StepTarget>& targets, const Outcome& outcome,
            const double* factors, bool zero_fill, bool skips, int threads);
  void work(int thread) noexcept;

 private:
  // A component that all threads work on.
  struct Shared {
    std::atomic<int> measuring{0};    // ticket: the next share to measure
    std::atomic<int64_t> unmeasured;  // shares
    std::atomic<bool> known{false};   // whether its norm is
  };

  int shares_of(int64_t component) const;
  void step_together(size_t index, int thread);
  void step_alone(int64_t component);
  void measure(int64_t begin, int64_t end);
  void finish(int64_t component);
  void update(int64_t begin, int64_t end);
  void update_run(const Piece& piece, int64_t start, int64_t count, double factor, bool erases) const;

  const std::vector<Piece>& pieces_;
  const Tiles& tiles_;
  const StepOrder& order_;
  const std::vector<StepGradient>& gradients_;
  const std::vector<StepTarget>& targets_;
  const Outcome outcome_;
  const double* const factors_;
  const bool zero_fill_, skips_;
  const int threads_;

  std::vector<double> partials_;
  std::unique_ptr<Shared[]> shared_;
  std::vector<int> measured_by_;                  // of each share of each shared component, the thread
  std::unique_ptr<std::atomic<bool>[]> updated_;  // likewise: whether somebody has taken it
  std::atomic<size_t> next_batch_{0};
};

}  // namespace cwclip::cpu
