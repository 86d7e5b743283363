#include "launch.h"

#include "adamw.cuh"
#include "kernels.cuh"

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace cwclip::cuda {
namespace {

// A number from the environment, for measurements, or the default.
int setting(const char* name, int otherwise) {
  const char* const text = std::getenv(name);
  return text == nullptr || *text == '\0' ? otherwise : std::atoi(text);
}

// Form 2 scales what is still in L2 of what it has measured. Above this share of L2 it would mostly read it again, and
// form 1 has less to do a tile.
constexpr double kFormTwoShareOfL2 = 0.4;

// One call's launches, on a current device.
class Launcher {
 public:
  Launcher(const Request& request, int processors)
      : request_(request),
        program_(*request.program),
        resident_(static_cast<uint32_t>(processors) *
                  static_cast<uint32_t>(std::max(1, setting("CWCLIP_CUDA_BLOCKS_PER_SM", kBlocksPerProcessor)))) {
    char* const tables = program_.tables;
    char* const workspace = request.workspace;
    call_.tables = {reinterpret_cast<const Tile*>(tables),
                    reinterpret_cast<const Span*>(tables + program_.spans_at),
                    reinterpret_cast<const int64_t*>(tables + program_.layouts_at)};
    call_.workspace = {reinterpret_cast<Counters*>(workspace),
                       reinterpret_cast<uint32_t*>(workspace + program_.sum_tickets_at),
                       reinterpret_cast<uint32_t*>(workspace + program_.done_at),
                       reinterpret_cast<uint32_t*>(workspace + program_.list_at),
                       reinterpret_cast<double*>(workspace + program_.partials_at)};
    call_.results = request.results;
    call_.rule = request.rule;
    call_.components = program_.components;
    call_.split = program_.split;
    call_.empty = program_.empty;
    call_.small_begin = program_.small_begin;
    call_.policy = setting("CWCLIP_CUDA_EVICT_HINTS", 0) != 0 ? kEvictLast : kEvictNormal;
    call_.scales = request.kind == Kind::clip;
    if (request.step.table != nullptr) steps_ = steps_at(program_, request.step.table, request.step.skip);
  }

  Failure all() {
    switch (request_.kind) {
      case Kind::power_sums: return by_order<Mode::sum>(true);
      case Kind::scale: {
        const Failure failure = launch<list_kernel>(blocks_for(program_.components), kThreads, stream(), false, call_);
        return failure != nullptr ? failure : by_capacity<Mode::scale, Order::two>(true);
      }
      case Kind::clip: {
        if (program_.split == 0) return by_order<Mode::sum>(true);  // which scales what is a tile
        if (form() == 2) return by_order<Mode::both>(true);
        const Failure failure = by_order<Mode::sum>(false);
        return failure != nullptr ? failure : by_capacity<Mode::scale, Order::two>(true);
      }
      case Kind::step: return step();
      case Kind::clip_step: {
        const Failure failure = by_order<Mode::sum>(true);
        return failure != nullptr ? failure : step();
      }
    }
    return "no such call";
  }

 private:
  // Form 2 scales any tile on the list, so its launch must have all addresses. Gradients with gaps are rare, and slow in
  // any form.
  int form() const {
    if (program_.ranges.size() != 1 || program_.gaps) return 1;
    const bool fits = static_cast<double>(program_.bytes) <= kFormTwoShareOfL2 * program_.traits.l2_bytes;
    return setting("CWCLIP_CUDA_FORM", fits ? 2 : 1);
  }

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
    if constexpr (order == Order::two) {  // others are rare, and each kernel takes time to compile
      if (program_.few) return every_range<mode, order, kFewAddresses, false>(last);
    }
    return every_range<mode, order, kManyAddresses, false>(last);
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
      fill(addresses);
      constexpr auto kernel = clip_kernel<mode, order, kCapacity, kGaps>;
      const bool overlaps = mode == Mode::scale && program_.traits.overlaps && setting("CWCLIP_CUDA_PDL", 1) != 0;
      const uint32_t blocks = blocks_for(turns(mode));
      const Failure failure = launch<kernel>(blocks, kThreads, stream(), overlaps, call_, addresses);
      if (failure != nullptr) return failure;
    }
    return nullptr;
  }

  // How many tiles, or bundles of small ones, a launch may find in its range. The list has no small ones, and what measures
  // has scaled them.
  uint32_t turns(Mode mode) const {
    const Range& range = call_.range;
    const uint32_t large = range.small_begin - range.tile_begin, small = range.tile_end - range.small_begin;
    return large + (mode == Mode::scale && call_.scales ? 0 : (small + kWorkerWarps - 1) / kWorkerWarps);
  }

  // The addresses of the gradients in this launch's range.
  template <int kCapacity>
  void fill(Addresses<kCapacity>& addresses) const {
    const Range& range = call_.range;
    for (int32_t s = range.segment_begin; s < range.segment_end; ++s) {
      addresses.address[s - range.segment_begin] = request_.addresses[program_.gradient_of[s]];
    }
  }

  Failure step() {
    const uint32_t gradients = static_cast<uint32_t>(program_.gradients);
    const uint32_t blocks = blocks_for((gradients + kWorkers - 1) / kWorkers);
    Rules rules;
    for (size_t first = 0; first < request_.step.count; first += kRules) {
      rules.first = static_cast<uint32_t>(first);
      rules.count = static_cast<uint32_t>(std::min<size_t>(kRules, request_.step.count - first));
      std::copy_n(request_.step.rules + first, rules.count, rules.rule);
      if (const Failure failure = launch<advance_kernel>(blocks, kWorkers, stream(), false, steps_, gradients, rules)) return failure;
    }
    if (program_.gaps) return step_ranges<kManyAddresses, true>();
    return program_.few ? step_ranges<kFewAddresses, false>() : step_ranges<kManyAddresses, false>();
  }

  template <int kCapacity, bool kGaps>
  Failure step_ranges() {
    Addresses<kCapacity> addresses;
    for (size_t i = program_.ranges.size(); i-- > 0;) {  // what was measured last first
      call_.range = program_.ranges[i];
      if (call_.range.tile_begin == call_.range.tile_end) continue;
      fill(addresses);
      const uint32_t blocks = call_.range.tile_end - call_.range.tile_begin;
      constexpr auto kernel = step_kernel<kCapacity, kGaps>;
      if (const Failure failure = launch<kernel>(blocks, kWorkers, stream(), false, call_, steps_, addresses)) return failure;
    }
    return nullptr;
  }

  uint32_t blocks_for(uint32_t work) const { return std::max(1u, std::min(work, resident_)); }

  Stream stream() const { return static_cast<Stream>(request_.stream); }

  const Request& request_;
  const Program& program_;
  const uint32_t resident_;  // blocks that run at a time
  Call call_ = {};
  Steps steps_ = {};
};

}  // namespace

const char* place(Program& program, char* tables, int device) {
  program.tables = tables;
  program.device = device;
  if (const Failure failure = set_device(device)) return failure;
  return find_traits<clip_kernel<Mode::scale, Order::two, kManyAddresses, false>>(device, &program.traits);
}

const char* enqueue(const Request& request) {
  if (const Failure failure = set_device(request.program->device)) return failure;
  int processors = 0;
  if (const Failure failure = count_processors(request.program->device, &processors)) return failure;
  return Launcher(request, processors).all();
}

std::string find_obstacle(int device) {
  int driver = 0;
  Failure failure = set_device(device);
  if (failure == nullptr) failure = find_driver(&driver);
  // Before CUDA 12.1 kernels with more than 4 KB of parameters load, and fail when they are launched.
  if (failure == nullptr && driver < 12010) {
    return "its driver knows CUDA " + std::to_string(driver / 1000) + "." + std::to_string(driver % 1000 / 10) +
           ", and 12.1 is needed; update the driver";
  }
  if (failure == nullptr) failure = find_image<clip_kernel<Mode::sum, Order::two, kManyAddresses, false>>();
  if (failure == nullptr) return {};
  return failure + std::string("; reinstall with TORCH_CUDA_ARCH_LIST set to its compute capability, by a CUDA toolkit "
                               "that its driver knows");
}

const char* find_state(int device, StreamState* stream) {
  const auto handle = static_cast<Stream>(stream->handle);
  if (const Failure failure = set_device(device)) return failure;
  if (const Failure failure = is_capturing(handle, &stream->capturing)) return failure;
  stream->number = 0;
  return stream->capturing ? nullptr : number_of(handle, &stream->number);
}

}  // namespace cwclip::cuda
