// The CPU's functions of the Python module.
#include "../common/tensor_list.h"
#include "queue.h"
#include "strided.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <utility>

namespace cwclip::cpu {
namespace {

// What is static about a bucket. Pieces have no addresses yet: each call has a copy of them, so that calls may overlap.
struct Program {
  static constexpr const char* kCapsule = "cwclip_kernels.cpu_program";
  std::vector<Piece> pieces;
  Tiles tiles;
  int64_t components;
  size_t gradients;
  bool wide;
};

// What every call begins with: a program, and its pieces at this call's addresses.
struct Call {
  explicit Call(Arguments& arguments) : program(arguments.capsule<Program>()) {
    char* const* const addresses = arguments.addresses(program == nullptr ? 0 : program->gradients);
    if (arguments.failed()) return;
    pieces = program->pieces;
    for (Piece& piece : pieces) piece.data = addresses[piece.gradient] + piece.offset * size_of(piece.dtype);
  }
  const Program* program;
  std::vector<Piece> pieces;
};

// Runs work(i) once on each of torch's threads, i counting them, in one parallel region; on fewer where there is little
// to do for each.
//
// Not on threads of our own: after a backward pass torch's are still spinning, ready at once, and in the way of any
// others. A crew that waits on a condition variable took 0.7 ms longer for 91 MB right after an operator of torch
// (2 cores), and was faster only where torch's threads had gone to sleep.
template <class Work>
void on_all_threads(const Tiles& tiles, const Work& work) {
  constexpr int64_t kBytesPerThread = 512 * 1024;
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), tiles.bytes / kBytesPerThread);
  if (threads <= 1) return work(0);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) work(static_cast<int>(i));
  });
}

// For work without an order: each(index) for every tile.
template <class Each>
void for_each_tile(const Tiles& tiles, const Each& each) {
  std::atomic<int64_t> next{0};
  const int64_t count = static_cast<int64_t>(tiles.batches.size()) - 1;
  on_all_threads(tiles, [&](int) {
    for (int64_t batch; (batch = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
      for (int64_t i = tiles.batches[batch]; i < tiles.batches[batch + 1]; ++i) each(i);
    }
  });
}

// Does the work without the GIL; None, or a RuntimeError of what it threw.
template <class Work>
PyObject* without_gil(const Work& work) {
  std::string failure;
  Py_BEGIN_ALLOW_THREADS;
  try {
    work();
  } catch (const std::exception& error) {
    failure = error.what();
    if (failure.empty()) failure = "unknown error";
  }
  Py_END_ALLOW_THREADS;
  if (!failure.empty()) return raise(PyExc_RuntimeError, failure);
  Py_RETURN_NONE;
}

PyObject* py_program(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments arguments(values, count, 5, "cpu_program(signature, components, cuts, count, wide)");
  return guarded([&]() -> PyObject* {
    BucketPieces bucket = read_bucket(arguments);
    if (arguments.failed()) return nullptr;
    Tiles tiles(bucket.pieces, bucket.components);
    return capsule_of(std::make_unique<Program>(
        Program{std::move(bucket.pieces), std::move(tiles), bucket.components, bucket.gradients, bucket.wide}));
  });
}

PyObject* py_power_sums(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments arguments(values, count, 4, "cpu_power_sums(program, addresses, norm_type, sums)");
  const Call call(arguments);
  const Order order = arguments.order();
  auto* const sums = arguments.pointer<double>();
  if (arguments.failed()) return nullptr;
  return without_gil([&] {
    const Tiles& tiles = call.program->tiles;
    std::vector<double> partials(tiles.tiles.size());
    for_each_tile(tiles, [&](int64_t i) {
      const Tile& tile = tiles.tiles[i];
      partials[i] = power_sum(call.pieces[tile.piece], tile.start, tile.count, order);
    });
    for (int64_t c = 0; c < call.program->components; ++c) {
      sums[c] = combine(partials.data() + tiles.first[c], tiles.first[c + 1] - tiles.first[c], order);
    }
  });
}

PyObject* py_scale(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments arguments(values, count, 4, "cpu_scale(program, addresses, factors, zero_fill)");
  const Call call(arguments);
  const auto* const factors = arguments.pointer<const double>();
  const bool zero_fill = arguments.flag();
  if (arguments.failed()) return nullptr;
  return without_gil([&] {
    for_each_tile(call.program->tiles, [&](int64_t i) {
      const Tile& tile = call.program->tiles.tiles[i];
      const double factor = factors[tile.component];
      if (factor == 1) return;
      scale(call.pieces[tile.piece], tile.start, tile.count, factor, zero_fill && factor == 0);
    });
  });
}

PyObject* py_clip(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments arguments(values, count, 9,
                      "cpu_clip(program, addresses, rule, caps, caps_stride, inverse, found_inf, norms, coefs)");
  const Call call(arguments);
  const auto* const rule = arguments.capsule<ClipRule>();
  const auto* const caps = arguments.pointer<const double>();
  const int64_t caps_stride = arguments.number();
  const auto* const inverse = arguments.pointer<const double>();
  auto* const found_inf = arguments.pointer<float>();
  void* const norms = arguments.pointer<void>();
  void* const coefs = arguments.pointer<void>();
  if (arguments.failed()) return nullptr;
  if (caps == nullptr || norms == nullptr || coefs == nullptr) return raise(PyExc_ValueError, "caps, norms, coefs: null");
  return without_gil([&] {
    const Program& program = *call.program;
    const int threads = std::max(1, static_cast<int>(torch::stable::get_num_threads()));
    const CallRule whole{caps, caps_stride, inverse, rule->eps, rule->nonfinite, program.wide};
    ClipQueue queue(call.pieces, program.tiles, rule->order, whole, norms, coefs, threads);
    on_all_threads(program.tiles, [&](int thread) { queue.work(thread); });
    if (found_inf != nullptr && queue.found_nonfinite()) *found_inf = 1;
  });
}

}  // namespace

PyMethodDef methods[] = {
    method("cpu_program", &py_program),
    method("cpu_power_sums", &py_power_sums),
    method("cpu_scale", &py_scale),
    method("cpu_clip", &py_clip),
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace cwclip::cpu
