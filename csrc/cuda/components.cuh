// From the sums of tiles to norms and coefficients, and to the list of what is to be scaled. See kernels.cuh.
#pragma once

#include "../common/formula.h"
#include "elements.cuh"

namespace cwclip::cuda {

enum class Mode { sum, scale, both };

constexpr uint32_t kNone = 0xffffffffu;

// Components of more tiles than this are added up by all workers of a block, others by its scheduler warp.
#if defined(CWCLIP_MANY_PARTIALS)
constexpr uint32_t kManyPartials = CWCLIP_MANY_PARTIALS;  // tests
#else
constexpr uint32_t kManyPartials = 1024;
#endif

// ---------------------------------------------------------------------------------------------------------------------
// Sums of sums
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

// The sum of what each worker warp has measured.
template <Order order>
CWCLIP_DEVICE double sum_of_warps(const double (&sums)[kWorkerWarps]) {
  double sum = sums[0];
#pragma unroll
  for (int warp = 1; warp < kWorkerWarps; ++warp) sum = merged<order>(sum, sums[warp]);
  return sum;
}

// This thread's share of a component's partial sums, eight loads in flight.
template <Order order, int kTeam>
CWCLIP_DEVICE double sum_of_partials(const Call& call, uint32_t component, int thread) {
  const Span span = call.tables.spans[component];
  const double* const partials = call.workspace.partials + span.first;
  double total = 0;
#pragma unroll 1
  for (uint32_t at = thread; at < span.count; at += kTeam * 8) {
    double loads[8];
#pragma unroll
    for (uint32_t k = 0; k < 8; ++k) {
      const uint32_t i = at + k * kTeam;
      loads[k] = load_relaxed(&partials[i < span.count ? i : at]);
    }
#pragma unroll
    for (uint32_t k = 0; k < 8; ++k) total = merged<order>(total, at + k * kTeam < span.count ? loads[k] : 0);
  }
  return total;
}

// ---------------------------------------------------------------------------------------------------------------------
// Norms and coefficients
// ---------------------------------------------------------------------------------------------------------------------

// What a component's gradients are multiplied by; or they become +0 whatever they are, if `erase`.
struct Scaling {
  double factor;
  bool erase;
};

CWCLIP_DEVICE Scaling scaling_of(const Call& call, double coef) {
  return {product(coef, inverse_of_scale(call.rule)), coef == 0 && call.rule.nonfinite == NonFinite::zero};
}

// What becomes of a component with this power sum; one thread stores what the call returns.
template <Order order>
CWCLIP_DEVICE Scaling conclude(const Call& call, uint32_t component, double sum, bool stores) {
  if (call.results.sums != nullptr) {
    if (stores) call.results.sums[component] = sum;
    return {1, false};
  }
  const bool wide = call.rule.wide;
  const double root = order == Order::two ? square_root(sum) : sum;
  const double norm = rounded(product(root, inverse_of_scale(call.rule)), wide);
  const double cap = call.rule.caps[component * call.rule.caps_stride];
  const double coef = rounded(coefficient(norm, cap, call.rule), wide);
  if (stores) {
    store_result(call.results.norms, component, norm, wide);
    store_result(call.results.coefs, component, coef, wide);
    if (call.results.found_inf != nullptr && !is_finite(sum)) store_relaxed(call.results.found_inf, bits_of(1.0f));
  }
  if (!call.scales) return {1, false};
  return scaling_of(call, coef);
}

// ---------------------------------------------------------------------------------------------------------------------
// The list
// ---------------------------------------------------------------------------------------------------------------------

// Puts a component's tiles on the list, so that the one read last is scaled first: it may still be in L2. Mode::both takes
// the list from its beginning, while Mode::scale, which comes after all reading, takes it from its end. By a whole warp,
// after one of its lanes has written the coefficient.
template <Mode mode>
CWCLIP_DEVICE void list_component(const Call& call, uint32_t component, int lane) {
  const Span span = call.tables.spans[component];
  uint32_t place = 0;
  if (lane == 0) place = fetch_add_relaxed(&call.workspace.counters->listed, span.count);
  place = from_first_lane(place);
  warp_barrier();
  uint32_t* const list = call.workspace.list + place;
  if constexpr (mode == Mode::both) {
    release_fence();
    for (uint32_t i = lane; i < span.count; i += kLanes) publish(&list[i], span.first + span.count - i);
  } else {
    for (uint32_t i = lane; i < span.count; i += kLanes) store_relaxed(&list[i], 1 + span.first + i);
  }
}

// Says what becomes of a component of several tiles. By a whole warp, whose first lane has the sum.
template <Mode mode, Order order>
CWCLIP_DEVICE void finish_component(const Call& call, uint32_t component, double sum, int lane) {
  uint32_t clipped = 0;
  if (lane == 0) clipped = conclude<order>(call, component, sum, true).factor != 1;  // NaN included
  if (from_first_lane(clipped)) list_component<mode>(call, component, lane);
  if constexpr (mode == Mode::both) {
    warp_barrier();
    if (lane == 0) fetch_add_acq_rel(&call.workspace.counters->finished, 1);
  }
}

}  // namespace cwclip::cuda
