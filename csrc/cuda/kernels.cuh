// Component clipping on a GPU: one kernel in three modes, and a small one that starts from given coefficients. An
// optimizer's step takes Mode::sum alone, and then what adamw.cuh has.
//
//   norm_c = (sum over the tiles of component c of |g|^p)^(1/p);  coef_c = min(1, cap_c / (norm_c + eps));  g <- coef_c g
//
// A block has eight worker warps and one scheduler warp. The workers do one tile after another and nothing else. Meanwhile
// the scheduler hands in the sum of the tile before, and finds the next tile, so that no load of a gradient waits for
// a ticket, a table or a counter. A warp that is done goes on to the next tile, whatever the others are at.
//
//   Mode::sum     Tiles are measured in the order of tickets. Whoever hands in a component's last tile adds up its
//                 partial sums in a fixed order, works out norm and coefficient, and puts the tiles of a component that
//                 is clipped on a list. Bytes: each gradient once.
//   Mode::scale   Tiles on the list are scaled. What isn't clipped costs nothing, not even a look. Bytes: each clipped
//                 gradient read once and written once. Form 1 is Mode::sum, then Mode::scale.
//   Mode::both    Form 2, a single launch: a block that finds a tile on the list scales it before it measures another, so
//                 that what was read last is scaled while it is still in L2 (benchmarks/l2_model.py). Every place in the
//                 list has one taker, who looks whether it has been filled; nobody waits while a tile that he has taken
//                 is unmeasured, and tiles taken are in the hands of blocks that run: progress needs no cooperative
//                 launch. tests/_support/native/queue.pml is a model of it.
//
// A component of one tile shares nothing: its block measures, judges and scales it at once, by a second reading out of L2,
// whatever the mode; a small one, of at most 4 KB, a single warp does, several to a block's turn. Where all components are
// so (biases, LoRA factors, rows), one launch is all. Bytes: each gradient once, and each clipped one written once.
//
// Deterministic: partial sums depend on the tile alone, they are added in an order that depends on their number alone,
// and scaling goes element by element. Which block does what, and the order of the list, change from run to run.
#pragma once

#include "scheduler.cuh"

namespace cwclip::cuda {

constexpr int kThreads = kWorkers + kLanes;
// 96 KB of loads in flight on each processor: twice what it takes to hide the latency of memory, so that a warp may wait
// for its next job. More would cost form 2 its reuse of L2, and registers.
constexpr int kBlocksPerProcessor = 3;

// ---------------------------------------------------------------------------------------------------------------------
// The worker warps
// ---------------------------------------------------------------------------------------------------------------------

// Of the tile's first element, or of its gradient's if that has gaps.
template <int kCapacity>
CWCLIP_DEVICE void* address_of(const Call& call, const Addresses<kCapacity>& addresses, const Tile& tile) {
  char* const gradient = static_cast<char*>(addresses.address[tile.segment - call.range.segment_begin]);
  return tile.layout >= 0 ? gradient : gradient + tile.start * size_of(tile.dtype);
}

// The power sum of a tile, by a team of threads; valid in each warp's first lane, of what the warp has read.
template <Order order, int kTeam, bool kGaps, class Load>
CWCLIP_DEVICE double measured(const Call& call, void* address, const Tile& tile, int thread, const Load& load) {
  double sum = 0;
  with_dtype(tile.dtype, [&](auto tag) {
    constexpr DType dtype = decltype(tag)::dtype;
    if (kGaps && tile.layout >= 0) {
      sum = sum_gapped<order, kTeam, dtype>(address, call.tables.layouts + tile.layout, tile.start, tile.count, thread);
    } else {
      sum = sum_dense<order, kTeam, dtype>(address, tile.count, thread, load);
    }
  });
  return sum_of_warp<order>(sum);
}

template <int kTeam, bool kGaps>
CWCLIP_DEVICE void scale(const Call& call, void* address, const Tile& tile, const Scaling& by, int thread) {
  with_dtype(tile.dtype, [&](auto tag) {
    constexpr DType dtype = decltype(tag)::dtype;
    if (kGaps && tile.layout >= 0) {
      scale_gapped<kTeam, dtype>(address, call.tables.layouts + tile.layout, tile.start, tile.count, by.factor, by.erase,
                                 thread);
    } else {
      scale_dense<kTeam, dtype>(address, tile.count, by.factor, by.erase, thread);
    }
  });
}

// Measures a tile, or each warp one of the small ones. What is a whole component is judged and, if it is clipped, scaled at
// once: its second reading finds it in L2.
template <Order order, bool kGaps, class Load>
CWCLIP_DEVICE void measure(const Call& call, void* address, const Tile& tile, Work work, double (&sums)[kWorkerWarps],
                           int thread, const Load& load) {
  const int warp = thread / kLanes, lane = thread % kLanes;
  double sum = 0;
  if (work == Work::small) {
    sum = measured<order, kLanes, false>(call, address, tile, lane, Read());
  } else {
    sum = measured<order, kWorkers, kGaps>(call, address, tile, thread, load);
    if (lane == 0) sums[warp] = sum;
    if (work == Work::sum) return;
    worker_barrier();
    sum = sum_of_warps<order>(sums);
  }
  Scaling scaling = {1, false};
  if (lane == 0) {  // of each warp, rather than one more barrier
    const bool stores = work == Work::small || warp == 0;
    scaling = conclude<order>(call, static_cast<uint32_t>(tile.component), sum, stores);
  }
  scaling.factor = from_first_lane(scaling.factor);
  scaling.erase = from_first_lane(static_cast<uint32_t>(scaling.erase));
  if (scaling.factor == 1) return;
  if (work == Work::small) {
    scale<kLanes, false>(call, address, tile, scaling, lane);
  } else {
    scale<kWorkers, kGaps>(call, address, tile, scaling, thread);
  }
}

// One turn of the workers.
template <Mode mode, Order order, int kCapacity, bool kGaps>
CWCLIP_DEVICE void work(const Call& call, const Addresses<kCapacity>& addresses, Shared& shared, uint32_t turn, int thread) {
  const Job& job = shared.jobs[turn];
  const int warp = thread / kLanes;
  if (job.work == Work::none) return;
  if (mode != Mode::scale && job.work == Work::add) {
    const double sum = sum_of_warp<order>(sum_of_partials<order, kWorkers>(call, job.first, thread));
    if (thread % kLanes == 0) shared.sums[turn][warp] = sum;
    return;
  }
  const bool is_small = mode != Mode::scale && job.work == Work::small;
  if (is_small && static_cast<uint32_t>(warp) >= job.count) return;
  const Tile& tile = shared.entries[job.slot][is_small ? warp : 0];
  void* const address = address_of(call, addresses, tile);
  if (mode == Mode::scale || (mode == Mode::both && job.work == Work::scale)) {
    scale<kWorkers, kGaps>(call, address, tile, job.scaling, thread);
  } else if constexpr (mode == Mode::both) {
    measure<order, kGaps>(call, address, tile, job.work, shared.sums[turn], thread, ReadWithPolicy{call.policy});
  } else if constexpr (mode == Mode::sum) {
    measure<order, kGaps>(call, address, tile, job.work, shared.sums[turn], thread, Read());
  }
}

// Scales what given coefficients clip of this launch's small components, a warp each.
template <int kCapacity>
CWCLIP_DEVICE void scale_small(const Call& call, const Addresses<kCapacity>& addresses, int thread) {
  const uint32_t warps = block_count() * kWorkerWarps;
  for (uint32_t i = call.range.small_begin + block_index() * kWorkerWarps + thread / kLanes; i < call.range.tile_end;
       i += warps) {
    const Tile tile = call.tables.tiles[i];
    const double coef = load_result(call.results.coefs, static_cast<uint32_t>(tile.component), call.rule.wide);
    const Scaling scaling = scaling_of(call, coef);
    if (scaling.factor != 1) scale<kLanes, false>(call, address_of(call, addresses, tile), tile, scaling, thread % kLanes);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Kernels
// ---------------------------------------------------------------------------------------------------------------------

// Components without elements, which no tile speaks for: norm 0, coefficient 1.
CWCLIP_DEVICE void fill_in_empty_components(const Call& call) {
  const uint32_t step = block_count() * kThreads;
  for (uint32_t c = block_index() * kThreads + thread_index(); c < call.components; c += step) {
    if (call.tables.spans[c].count != 0) continue;
    if (call.results.sums != nullptr) {
      call.results.sums[c] = 0;
    } else {
      store_result(call.results.norms, c, 0, call.rule.wide);
      store_result(call.results.coefs, c, 1, call.rule.wide);
    }
  }
}

// The last block to leave the call's last launch sets every counter back, for the next call.
CWCLIP_DEVICE void leave(const Call& call) {
  Counters* const counters = call.workspace.counters;
  if (!call.range.last || fetch_add_acq_rel(&counters->left, 1) != block_count() - 1) return;
  store_relaxed(&counters->scale_ticket, 0);
  store_relaxed(&counters->listed, 0);
  store_relaxed(&counters->finished, 0);
  store_relaxed(&counters->left, 0);
  for (uint32_t i = 0; i < call.range.tables; ++i) store_relaxed(&call.workspace.sum_tickets[i], 0);
}

// Measures, scales, or both; see the head of this file. Any number of blocks from one up.
template <Mode mode, Order order, int kCapacity, bool kGaps>
CWCLIP_KERNEL void CWCLIP_BOUNDS(kThreads, kBlocksPerProcessor)
    clip_kernel(CWCLIP_PARAMETER(Call) call, CWCLIP_PARAMETER(Addresses<kCapacity>) addresses) {
  CWCLIP_SHARED(Shared, shared);
  const int thread = thread_index(), lane = thread % kLanes;
  if constexpr (mode == Mode::scale) {
    wait_for_kernel_before();
    if (!call.scales && thread < kWorkers) scale_small(call, addresses, thread);
  } else {
    let_next_kernel_begin();
    if (call.empty != 0 && call.range.table == 0) fill_in_empty_components(call);
  }

  if (thread == 0) {
    for (int turn = 0; turn < 2; ++turn) {
      init_signal(&shared.ready[turn], 1);
      init_signal(&shared.done[turn], kWorkerWarps);
    }
  }
  block_barrier();
  if (thread < kWorkers) {
    for (uint32_t count = 0;; ++count) {
      const uint32_t turn = count & 1, parity = count >> 1 & 1;
      wait_for(&shared.ready[turn], parity);
      if (shared.jobs[turn].work == Work::leave) return;
      work<mode, order, kCapacity, kGaps>(call, addresses, shared, turn, thread);
      warp_barrier();
      if (lane == 0) arrive(&shared.done[turn]);
    }
  }
  Scheduler<mode> scheduler(call, shared);
  if (lane == 0) scheduler.begin();
  for (uint32_t count = 0;; ++count) {
    const uint32_t turn = count & 1;
    const Job& job = shared.jobs[turn];
    Job& other = shared.jobs[turn ^ 1];
    if (lane == 0) arrive(&shared.ready[turn]);
    warp_barrier();
    if (job.work == Work::leave) break;
    if (lane == 0) scheduler.look_ahead(job, other);
    if (count != 0) {
      wait_for(&shared.done[turn ^ 1], (count - 1) >> 1 & 1);
      if constexpr (mode != Mode::scale) scheduler.template hand_in<order>(other, shared.sums[turn ^ 1], lane);
    }
    warp_barrier();
    if (lane == 0) scheduler.next(job, other);
  }
  if (lane == 0) leave(call);
}

// Puts on the list what given coefficients clip: one warp for each component that isn't small. Before Mode::scale.
CWCLIP_KERNEL void CWCLIP_BOUNDS(kThreads, 1) list_kernel(CWCLIP_PARAMETER(Call) call) {
  let_next_kernel_begin();
  const int lane = thread_index() % kLanes;
  const uint32_t warps = kThreads / kLanes;
  for (uint32_t c = block_index() * warps + thread_index() / kLanes; c < call.components; c += block_count() * warps) {
    if (call.tables.spans[c].first >= call.small_begin) continue;
    if (load_result(call.results.coefs, c, call.rule.wide) != 1) list_component<Mode::scale>(call, c, lane);
  }
}

}  // namespace cwclip::cuda
