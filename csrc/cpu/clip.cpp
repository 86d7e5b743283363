// The CPU's functions of the Python module.
#include "../common/formula.h"
#include "call.h"
#include "strided.h"

#include <utility>

namespace cwclip::cpu {
namespace {

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
    const Outcome outcome{rule->order, whole, inverse_of_scale(whole), norms, coefs};
    ClipQueue queue(call.pieces, program.tiles, outcome, threads);
    on_all_threads(program.tiles.bytes, [&](int thread) { queue.work(thread); });
    if (found_inf != nullptr && queue.found_nonfinite()) *found_inf = 1;
  });
}

}  // namespace

PyMethodDef methods[] = {
    method("cpu_program", &py_program),
    method("cpu_power_sums", &py_power_sums),
    method("cpu_scale", &py_scale),
    method("cpu_clip", &py_clip),
    method("cpu_step_program", &py_step_program),
    method("cpu_clip_adamw", &py_clip_adamw),
    method("cpu_adamw", &py_adamw),
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace cwclip::cpu
