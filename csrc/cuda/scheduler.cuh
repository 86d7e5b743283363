// A block's scheduler warp: finds what its workers do next, and hands in what they have measured. See kernels.cuh.
#pragma once

#include "components.cuh"

namespace cwclip::cuda {

enum class Work : int32_t {
  sum,     // a tile, one of several of its component
  add,     // the partial sums of a large component
  whole,   // a tile that is its component: measured, judged and scaled
  small,   // several of these, one for each warp
  scale,   // a tile on the list
  none,    // nothing, until the sum that the block has been working on is handed in
  leave,
};

// What a block's workers do in a turn.
struct Job {
  Work work;
  int32_t slot;    // of the tiles' entries
  uint32_t first;  // tile; of Work::add the component
  uint32_t count;  // tiles
  Scaling scaling;
};

// Entries of the table of tiles come straight to shared memory, as registers are what limits loads in flight. Of the three
// slots two are those of the jobs, and the third is what look_ahead() has asked for.
struct Shared {
  Tile entries[3][kWorkerWarps];
  Job jobs[2];                   // this one; and the one before, then the one after
  double sums[2][kWorkerWarps];  // likewise: of each worker warp
  // Likewise: the job is there, one arrival; all worker warps are done with it. A warp goes on to the next job as soon as
  // that is there, whatever the others are at.
  Signal ready[2], done[2];
};

// One lane's business, but for hand_in().
template <Mode mode>
struct Scheduler {
  CWCLIP_DEVICE Scheduler(const Call& call, Shared& shared) : call(call), shared(shared) {}

  // The first job. Where no block waits for another, its first ticket is its own number, and counters start behind these.
  // In Mode::both a ticket must never be that of a block that hasn't begun.
  CWCLIP_DEVICE void begin() {
    if constexpr (mode == Mode::scale) {
      place = block_index();
      listed = load_relaxed(&call.workspace.counters->listed);
    } else {
      ticket = mode == Mode::sum ? block_index() : draw_ticket();
    }
    shared.jobs[0] = {Work::none, 0, 0, 0, {}};
    shared.jobs[1] = {Work::none, 1, 0, 0, {}};
    look_ahead(shared.jobs[0], shared.jobs[1]);
    next(shared.jobs[1], shared.jobs[0]);
  }

  // Asks for the entries of what comes next, so that next() needn't wait.
  CWCLIP_DEVICE void look_ahead(const Job& job, const Job& other) {
    if (ahead != kNone) return;
    const int32_t slot = 3 - job.slot - other.slot;
    if constexpr (mode == Mode::scale) {
      ahead = take_from_end();
      if (ahead != kNone) fetch(slot, ahead, 1);
    } else {
      const uint32_t large = call.range.small_begin - call.range.tile_begin;
      if (ticket < large) {
        ahead = call.range.tile_begin + ticket;
        ahead_count = 1;
      } else {
        const uint32_t small = call.range.small_begin + (ticket - large) * kWorkerWarps;
        if (small >= call.range.tile_end) return;
        ahead = small;
        ahead_count = call.range.tile_end - small;
        if (ahead_count > kWorkerWarps) ahead_count = kWorkerWarps;
      }
      fetch(slot, ahead, ahead_count);
      ticket = draw_ticket();
    }
  }

  // The next job, in place of the one before. `job` is what the workers are at. To be asked for as late as possible: what
  // is listed by then is scaled while it is in L2, what isn't waits for a turn.
  CWCLIP_DEVICE void next(const Job& job, Job& other) {
    if (mode != Mode::scale && to_add != kNone) {
      other.work = Work::add;
      other.first = to_add;
      to_add = kNone;
      return;
    }
    const bool sum_in_hand = job.work == Work::sum || job.work == Work::add;
    for (bool all_finished = false;;) {
      if constexpr (mode == Mode::both) {
        const uint32_t tile = take_listed();
        if (tile != kNone) {
          fetch(other.slot, tile, 1);
          wait_for_copies();
          return scale(other, tile);
        }
      }
      if (ahead != kNone) {
        wait_for_copies();
        other.slot = 3 - job.slot - other.slot;
        const uint32_t first = ahead;
        ahead = kNone;
        if constexpr (mode == Mode::scale) {
          return scale(other, first);
        } else {
          other.first = first;
          other.count = ahead_count;
          other.work = first >= call.range.small_begin             ? Work::small
                       : shared.entries[other.slot][0].of == 1 ? Work::whole
                                                                   : Work::sum;
          return;
        }
      }
      other.work = sum_in_hand ? Work::none : Work::leave;
      if (mode != Mode::both || sum_in_hand || all_finished) return;
      // Once all are finished, what isn't listed never will be: one more look, and in this order.
      all_finished = load_acquire(&call.workspace.counters->finished) == call.split;
      if (!all_finished) pause();
    }
  }

  // Hands in what the job before has measured. Whoever hands in a component's last tile adds it up; or, if that is too much
  // for a warp, lets the block's workers do so. By the whole warp.
  template <Order order>
  CWCLIP_DEVICE void hand_in(const Job& other, const double (&sums)[kWorkerWarps], int lane) {
    if (other.work != Work::sum && other.work != Work::add) return;
    double sum = sum_of_warps<order>(sums);
    uint32_t component = other.first;
    if (other.work == Work::sum) {
      const Tile& entry = shared.entries[other.slot][0];
      const uint32_t of = static_cast<uint32_t>(entry.of);
      component = static_cast<uint32_t>(entry.component);
      uint32_t is_last = 0;
      if (lane == 0) {
        uint32_t* const done = &call.workspace.done[component];
        call.workspace.partials[other.first] = sum;
        is_last = fetch_add_acq_rel(done, 1) == of - 1;
        if (is_last) store_relaxed(done, 0);
      }
      if (!from_first_lane(is_last)) return;
      warp_barrier();  // what its first lane has acquired, all have
      if (of > kManyPartials) {
        to_add = component;
        return;
      }
      sum = sum_of_warp<order>(sum_of_partials<order, kLanes>(call, component, lane));
    }
    finish_component<mode, order>(call, component, sum, lane);
  }

 private:
  CWCLIP_DEVICE uint32_t draw_ticket() {
    const uint32_t drawn = fetch_add_relaxed(&call.workspace.sum_tickets[call.range.table], 1);
    return mode == Mode::sum ? block_count() + drawn : drawn;
  }

  CWCLIP_DEVICE void fetch(int32_t slot, uint32_t first, uint32_t count) {
    static_assert(sizeof(Tile) == 2 * sizeof(Vector));
    const auto* from = reinterpret_cast<const Vector*>(call.tables.tiles + first);
    auto* to = reinterpret_cast<Vector*>(shared.entries[slot]);
    for (uint32_t i = 0; i < 2 * count; ++i) copy_async(to + i, from + i);
  }

  CWCLIP_DEVICE void scale(Job& job, uint32_t tile) {
    job.work = Work::scale;
    job.first = tile;
    const uint32_t component = static_cast<uint32_t>(shared.entries[job.slot][0].component);
    job.scaling = scaling_of(call, load_result(call.results.coefs, component, call.rule.wide));
  }

  // A listed tile, or kNone. A place is drawn when there are more listed than drawn; several blocks may do so at once, and
  // who has an empty one keeps it, to look at again.
  CWCLIP_DEVICE uint32_t take_listed() {
    Counters* const counters = call.workspace.counters;
    if (place == kNone) {
      if (load_relaxed(&counters->listed) <= load_relaxed(&counters->scale_ticket)) return kNone;
      place = fetch_add_relaxed(&counters->scale_ticket, 1);
    }
    if (place >= call.range.tile_end) return kNone;
    uint32_t* const entry = &call.workspace.list[place];
    const uint32_t listed_tile = load_acquire(entry);
    if (listed_tile == 0) return kNone;
    store_relaxed(entry, 0);
    place = kNone;
    return listed_tile - 1;
  }

  // The next of this block's places, from the end, that this launch can reach; or kNone.
  CWCLIP_DEVICE uint32_t take_from_end() {
    while (place < listed) {
      uint32_t* const entry = &call.workspace.list[listed - 1 - place];
      place += block_count();
      const uint32_t tile = load_relaxed(entry) - 1;  // an empty place: past every tile
      if (tile < call.range.tile_begin || tile >= call.range.tile_end) continue;
      store_relaxed(entry, 0);
      return tile;
    }
    return kNone;
  }

  const Call& call;
  Shared& shared;
  uint32_t ticket = kNone;                   // of the tiles to measure after `ahead`
  uint32_t ahead = kNone, ahead_count = 1;   // tiles whose entries have been asked for
  uint32_t to_add = kNone;                   // a component
  uint32_t place = kNone, listed = 0;        // in the list: to look at; of Mode::scale how long it is
};

}  // namespace cwclip::cuda
