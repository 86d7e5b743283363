#include "launch.h"

#include "kernels.cuh"

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace cwclip::cuda {
namespace {

// A number from the environment, for measurements, or the default.
int setting(const char* name, int otherwise) {
  const char* const text = std::getenv(name);
  const int value = text == nullptr ? 0 : std::atoi(text);
  return value > 0 ? value : otherwise;
}

// One call's launches, on a current device.
class Launcher {
 public:
  Launcher(const Request& request, int processors)
      : request_(request),
        program_(*request.program),
        resident_(static_cast<uint32_t>(processors) *
                  static_cast<uint32_t>(setting("CWCLIP_CUDA_BLOCKS_PER_SM", kBlocksPerProcessor))) {
    char* const tables = program_.tables;
    char* const workspace = request.workspace;
    call_.tables = {reinterpret_cast<const Tile*>(tables),
                    reinterpret_cast<const uint32_t*>(tables + program_.spans_at),
                    reinterpret_cast<const int64_t*>(tables + program_.layouts_at)};
    call_.workspace = {reinterpret_cast<Counters*>(workspace),
                       reinterpret_cast<uint32_t*>(workspace + program_.sum_tickets_at),
                       reinterpret_cast<uint32_t*>(workspace + program_.done_at),
                       reinterpret_cast<uint32_t*>(workspace + program_.list_at),
                       reinterpret_cast<double*>(workspace + program_.partials_at)};
    call_.results = request.results;
    call_.rule = request.rule;
    call_.components = program_.components;
    call_.measured = program_.measured;
  }

  Failure all() {
    // Form 2 scales any tile on the list, so its launch must have all addresses. Gradients with gaps are rare, and slow in
    // any form.
    const bool one_launch = program_.ranges.size() == 1 && !program_.gaps && setting("CWCLIP_CUDA_FORM", 1) == 2;
    switch (request_.kind) {
      case Kind::power_sums: return by_order<Mode::sum>(true);
      case Kind::scale: {
        const Failure failure = launch<list_kernel>(blocks_for(program_.components), kThreads, stream(), call_);
        return failure != nullptr ? failure : by_capacity<Mode::scale, Order::two>(true);
      }
      case Kind::clip: {
        if (one_launch) return by_order<Mode::both>(true);
        const Failure failure = by_order<Mode::sum>(false);
        return failure != nullptr ? failure : by_capacity<Mode::scale, Order::two>(true);
      }
    }
    return "no such call";
  }

 private:
  template <Mode mode>
  Failure by_order(bool last) {
    switch (request_.order) {
      case Order::one: return by_capacity<mode, Order::one>(last);
      case Order::two: return by_capacity<mode, Order::two>(last);
      case Order::inf: return by_capacity<mode, Order::inf>(last);
    }
    return "no such order";
  }

  template <Mode mode, Order order>
  Failure by_capacity(bool last) {
    if constexpr (mode != Mode::both) {
      if (program_.gaps) return every_range<mode, order, kManyAddresses, true>(last);
    }
    return program_.few ? every_range<mode, order, kFewAddresses, false>(last)
                        : every_range<mode, order, kManyAddresses, false>(last);
  }

  // One launch for each table of addresses; `last` if nothing comes after them.
  template <Mode mode, Order order, int kCapacity, bool kGaps>
  Failure every_range(bool last) {
    Addresses<kCapacity> addresses;
    const size_t launches = program_.ranges.size();
    for (size_t i = 0; i < launches; ++i) {
      // What was measured last is scaled first.
      call_.range = program_.ranges[mode == Mode::scale ? launches - 1 - i : i];
      call_.range.last = last && i == launches - 1;
      const Range& range = call_.range;
      for (int32_t s = range.segment_begin; s < range.segment_end; ++s) {
        addresses.address[s - range.segment_begin] = request_.addresses[program_.gradient_of[s]];
      }
      const uint32_t blocks = blocks_for(range.tile_end - range.tile_begin);
      constexpr auto kernel = clip_kernel<mode, order, kCapacity, kGaps>;
      const Failure failure = launch<kernel>(blocks, kThreads, stream(), call_, addresses);
      if (failure != nullptr) return failure;
    }
    return nullptr;
  }

  uint32_t blocks_for(uint32_t work) const { return std::max(1u, std::min(work, resident_)); }

  Stream stream() const { return static_cast<Stream>(request_.stream); }

  const Request& request_;
  const Program& program_;
  const uint32_t resident_;  // blocks that run at a time
  Call call_ = {};
};

}  // namespace

const char* enqueue(const Request& request) {
  if (const Failure failure = set_device(request.program->device)) return failure;
  int processors = 0;
  if (const Failure failure = count_processors(request.program->device, &processors)) return failure;
  return Launcher(request, processors).all();
}

const char* find_obstacle(int device) {
  const Failure failure = set_device(device);
  return failure != nullptr ? failure : find_image<list_kernel>();
}

const char* find_capturing(int device, void* stream, bool* capturing) {
  const Failure failure = set_device(device);
  return failure != nullptr ? failure : is_capturing(static_cast<Stream>(stream), capturing);
}

}  // namespace cwclip::cuda
