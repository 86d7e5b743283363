// A block's scheduler warp: finds the block's next tile, and hands in what its workers have measured. See kernels.cuh.
#pragma once

#include "../common/formula.h"
#include "elements.cuh"

namespace cwclip::cuda {

enum class Mode { sum, scale, both };

constexpr int kThreads = kWorkers + kLanes;
// 96 KB of loads in flight on each processor: twice what it takes to hide the latency of memory, so that a block may
// pause at its barrier. More would cost form 2 its reuse of L2, and registers.
constexpr int kBlocksPerProcessor = 3;

enum class Work : int32_t { sum, scale, none, leave };

// What a block's workers do next, all they need to know.
struct Job {
  Work work;
  DType dtype;
  void* address;          // of the run's first element, or of the gradient's if that has gaps
  int64_t start;          // used with gaps only
  const int64_t* layout;  // null if dense
  int32_t count;
  bool erase;
  uint32_t tile;
  uint32_t component;
  uint32_t of;  // tiles of the component
  double coef;
};

struct Shared {
  Job jobs[2];                    // this one and the next
  double sums[2][kWorkerWarps];  // likewise: of each worker warp
};

// ---------------------------------------------------------------------------------------------------------------------
// Sums, handed in
// ---------------------------------------------------------------------------------------------------------------------

// The sum of a warp's values, or their maximum, in a fixed tree; valid in its first lane.
template <Order order>
CWCLIP_DEVICE double sum_of_warp(double value) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    value = merged<order>(value, from_lane_above(value, distance));
  }
  return value;
}

// Puts a component's tiles on the list, so that the one read last is scaled first: it may still be in L2. Mode::both takes
// the list from its beginning, while Mode::scale, which comes after all reading, takes it from its end. By a whole warp,
// after one of its lanes has written the coefficient.
template <Mode mode>
CWCLIP_DEVICE void list_component(const Call& call, uint32_t component, int lane) {
  const uint32_t first = call.tables.spans[component];
  const uint32_t count = call.tables.spans[component + 1] - first;
  uint32_t place = 0;
  if (lane == 0) place = fetch_add_relaxed(&call.workspace.counters->listed, count);
  place = from_first_lane(place);
  warp_barrier();
  for (uint32_t i = lane; i < count; i += kLanes) {
    const uint32_t tile = mode == Mode::both ? first + count - 1 - i : first + i;
    store_release(&call.workspace.list[place + i], 1 + tile);
  }
}

// Adds up a component whose last tile has been measured, and says what becomes of it.
template <Mode mode, Order order>
CWCLIP_DEVICE void finish_component(const Call& call, uint32_t component, int lane) {
  const uint32_t first = call.tables.spans[component], last = call.tables.spans[component + 1];
  double sum = 0;
  for (uint32_t i = first + lane; i < last; i += kLanes) {
    sum = merged<order>(sum, load_relaxed(&call.workspace.partials[i]));
  }
  sum = sum_of_warp<order>(sum);
  uint32_t clipped = 0;
  if (lane == 0) {
    store_relaxed(&call.workspace.done[component], 0);
    if (call.results.sums != nullptr) {
      call.results.sums[component] = sum;
    } else {
      const bool wide = call.rule.wide;
      const double inverse = inverse_of_scale(call.rule);
      const double norm = rounded(product(order == Order::two ? square_root(sum) : sum, inverse), wide);
      const double cap = call.rule.caps[component * call.rule.caps_stride];
      const double coef = rounded(coefficient(norm, cap, call.rule), wide);
      store_result(call.results.norms, component, norm, wide);
      store_result(call.results.coefs, component, coef, wide);
      clipped = call.lists && product(coef, inverse) != 1;  // NaN included
      if (call.results.found_inf != nullptr && !is_finite(sum)) store_relaxed(call.results.found_inf, bits_of(1.0f));
    }
  }
  if (from_first_lane(clipped)) list_component<mode>(call, component, lane);
  warp_barrier();
  if (lane == 0) fetch_add_acq_rel(&call.workspace.counters->finished, 1);
}

// Hands in what the workers have measured.
template <Mode mode, Order order>
CWCLIP_DEVICE void hand_in(const Call& call, const Job& job, const double (&sums)[kWorkerWarps], int lane) {
  uint32_t is_last = 0;
  if (lane == 0) {
    double sum = sums[0];
#pragma unroll
    for (int warp = 1; warp < kWorkerWarps; ++warp) sum = merged<order>(sum, sums[warp]);
    call.workspace.partials[job.tile] = sum;
    is_last = fetch_add_acq_rel(&call.workspace.done[job.component], 1) == job.of - 1;
  }
  is_last = from_first_lane(is_last);
  warp_barrier();  // what its first lane has acquired, all have
  if (is_last) finish_component<mode, order>(call, job.component, lane);
}

// ---------------------------------------------------------------------------------------------------------------------
// The next tile
// ---------------------------------------------------------------------------------------------------------------------

// Finds a block's next tile. One lane's business.
template <Mode mode, int kCapacity>
struct Scheduler {
  CWCLIP_DEVICE Scheduler(const Call& call, const Addresses<kCapacity>& addresses, bool on_duty)
      : call(call), addresses(addresses) {
    if (!on_duty) return;
    Counters* const counters = call.workspace.counters;
    if constexpr (mode != Mode::scale) ticket_after = draw_sum_ticket();
    if constexpr (mode == Mode::both) place = fetch_add_relaxed(&counters->scale_ticket, 1);
    if constexpr (mode == Mode::scale) {
      place = block_index();
      listed = load_acquire(&counters->listed);
    }
    look_ahead();
  }

  // Reads the table's entry of the next tile to measure, and draws the ticket after it, so that next() needn't wait.
  CWCLIP_DEVICE void look_ahead() {
    if constexpr (mode != Mode::scale) {
      if (ticket != kNone || ticket_after >= call.range.tile_end) return;
      ticket = ticket_after;
      tile = call.tables.tiles[ticket];
      ticket_after = draw_sum_ticket();
    }
  }

  // The next job. Work::none if there is nothing to do until the sum that the block is working on is handed in. To be
  // asked for as late as possible: what is listed by then is scaled while it is in L2, what isn't waits for a turn.
  CWCLIP_DEVICE Job next(bool sum_in_hand) {
    for (bool all_finished = false;;) {
      if constexpr (mode != Mode::sum) {
        if (const uint32_t entry = take_listed()) return scale_job(entry - 1);
      }
      if constexpr (mode != Mode::scale) {
        if (ticket != kNone) {
          const Job job = job_of(ticket, tile, Work::sum);
          ticket = kNone;
          return job;
        }
      }
      if (sum_in_hand) return idle(Work::none);
      if (mode != Mode::both || all_finished) return idle(Work::leave);
      // Once all are finished, a place that is empty stays empty: one more look, and in this order.
      all_finished = load_acquire(&call.workspace.counters->finished) == call.measured;
      if (!all_finished) pause();
    }
  }

 private:
  static constexpr uint32_t kNone = 0xffffffffu;

  CWCLIP_DEVICE uint32_t draw_sum_ticket() {
    return call.range.tile_begin + fetch_add_relaxed(&call.workspace.sum_tickets[call.range.table], 1);
  }

  // 1 + a listed tile that this launch can reach, or 0. An empty place stays this block's to look at again.
  CWCLIP_DEVICE uint32_t take_listed() {
    uint32_t* const list = call.workspace.list;
    if constexpr (mode == Mode::both) {
      if (place >= call.range.tile_end) return 0;
      const uint32_t entry = load_acquire(&list[place]);
      if (entry != 0) {
        store_relaxed(&list[place], 0);
        place = fetch_add_relaxed(&call.workspace.counters->scale_ticket, 1);
      }
      return entry;
    } else {
      while (place < listed) {
        uint32_t* const last = &list[listed - 1 - place];
        place += block_count();
        const uint32_t entry = load_acquire(last);
        if (entry == 0 || entry - 1 < call.range.tile_begin || entry - 1 >= call.range.tile_end) continue;
        store_relaxed(last, 0);
        return entry;
      }
      return 0;
    }
  }

  CWCLIP_DEVICE Job scale_job(uint32_t tile) const {
    Job job = job_of(tile, call.tables.tiles[tile], Work::scale);
    const double coef = load_result(call.results.coefs, job.component, call.rule.wide);
    job.coef = product(coef, inverse_of_scale(call.rule));
    job.erase = coef == 0 && call.rule.nonfinite == NonFinite::zero;
    return job;
  }

  CWCLIP_DEVICE Job job_of(uint32_t index, const Tile& tile, Work work) const {
    Job job;
    job.work = work;
    job.dtype = tile.dtype;
    job.address = addresses.address[tile.segment - call.range.segment_begin];
    job.start = tile.start;
    job.layout = nullptr;
    if (tile.layout >= 0) {
      job.layout = call.tables.layouts + tile.layout;
    } else {
      job.address = static_cast<char*>(job.address) + tile.start * size_of(tile.dtype);
    }
    job.count = tile.count;
    job.erase = false;
    job.tile = index;
    job.component = static_cast<uint32_t>(tile.component);
    job.of = static_cast<uint32_t>(tile.of);
    job.coef = 1;
    return job;
  }

  CWCLIP_DEVICE static Job idle(Work work) {
    Job job = {};
    job.work = work;
    return job;
  }

  const Call& call;
  const Addresses<kCapacity>& addresses;
  uint32_t ticket = kNone, ticket_after = 0;  // tile to measure next, if any, and the one after it
  Tile tile;                                  // the former's entry in the table
  uint32_t place = 0, listed = 0;             // in the list: to look at next; places that are filled
};

}  // namespace cwclip::cuda
