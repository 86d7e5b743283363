// Component clipping on a GPU: one kernel in three modes, and a small one that starts from given coefficients. An
// optimizer's step takes Mode::sum alone, and then what adamw.cuh has.
//
//   norm_c = (sum over the tiles of component c of |g|^p)^(1/p);  coef_c = min(1, cap_c / (norm_c + eps));  g <- coef_c g
//
// A block has eight worker warps and one scheduler warp. The workers do one tile after another and nothing else. Meanwhile
// the scheduler hands in the sum of the tile before, and finds the next tile, so that no load of a gradient waits for
// a ticket, a table or a counter.
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
// Deterministic: partial sums depend on the tile alone, they are added in an order that depends on their number alone,
// and scaling goes element by element. Which block does what, and the order of the list, change from run to run.
#pragma once

#include "scheduler.cuh"

namespace cwclip::cuda {

// ---------------------------------------------------------------------------------------------------------------------
// The worker warps
// ---------------------------------------------------------------------------------------------------------------------

template <Order order, bool kGaps>
CWCLIP_DEVICE void measure(const Job& job, double (&sums)[kWorkerWarps], int thread) {
  double sum = 0;
  with_dtype(job.dtype, [&](auto tag) {
    constexpr DType dtype = decltype(tag)::dtype;
    if (kGaps && job.layout != nullptr) {
      sum = sum_gapped<order, dtype>(job.address, job.layout, job.start, job.count, thread);
    } else {
      sum = sum_dense<order, dtype>(job.address, job.count, thread);
    }
  });
  sum = sum_of_warp<order>(sum);
  if (thread % kLanes == 0) sums[thread / kLanes] = sum;
}

template <bool kGaps>
CWCLIP_DEVICE void rescale(const Job& job, int thread) {
  with_dtype(job.dtype, [&](auto tag) {
    constexpr DType dtype = decltype(tag)::dtype;
    if (kGaps && job.layout != nullptr) {
      scale_gapped<dtype>(job.address, job.layout, job.start, job.count, job.coef, job.erase, thread);
    } else {
      scale_dense<dtype>(job.address, job.count, job.coef, job.erase, thread);
    }
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// Kernels
// ---------------------------------------------------------------------------------------------------------------------

// Components without elements, which no tile speaks for: norm 0, coefficient 1.
CWCLIP_DEVICE void fill_in_empty_components(const Call& call) {
  const uint32_t step = block_count() * kThreads;
  for (uint32_t c = block_index() * kThreads + thread_index(); c < call.components; c += step) {
    if (call.tables.spans[c] != call.tables.spans[c + 1]) continue;
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
  const bool is_worker = thread < kWorkers;
  if (mode != Mode::scale && call.measured < call.components && call.range.table == 0) fill_in_empty_components(call);

  Scheduler<mode, kCapacity> scheduler(call, addresses, thread == kWorkers);
  if (thread == kWorkers) {
    shared.jobs[0] = scheduler.next(false);
    shared.jobs[1].work = Work::none;
  }
  block_barrier();
  for (int turn = 0;; turn ^= 1) {
    const Job& job = shared.jobs[turn];
    Job& other = shared.jobs[turn ^ 1];  // the one before, and then the one after
    if (job.work == Work::leave) break;
    if (is_worker) {
      if (mode != Mode::scale && job.work == Work::sum) measure<order, kGaps>(job, shared.sums[turn], thread);
      if (mode != Mode::sum && job.work == Work::scale) rescale<kGaps>(job, thread);
    } else {
      if (lane == 0) scheduler.look_ahead();
      if (mode != Mode::scale && other.work == Work::sum) hand_in<mode, order>(call, other, shared.sums[turn ^ 1], lane);
      warp_barrier();
      if (lane == 0) other = scheduler.next(job.work == Work::sum);
    }
    block_barrier();
  }
  if (thread == kWorkers) leave(call);
}

// Puts on the list what given coefficients clip: one warp for each component. Before Mode::scale.
CWCLIP_KERNEL void CWCLIP_BOUNDS(kThreads, 1) list_kernel(CWCLIP_PARAMETER(Call) call) {
  const int lane = thread_index() % kLanes;
  const uint32_t warps = kThreads / kLanes;
  for (uint32_t c = block_index() * warps + thread_index() / kLanes; c < call.components; c += block_count() * warps) {
    if (load_result(call.results.coefs, c, call.rule.wide) != 1) list_component<Mode::scale>(call, c, lane);
  }
}

}  // namespace cwclip::cuda
