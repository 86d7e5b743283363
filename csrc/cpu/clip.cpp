// The CPU's functions of the Python module.
#include "../common/formula.h"
#include "../common/tensor_list.h"
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

// What clipping reads and writes beside the gradients.
struct ClipMemory {
  const double* caps;
  int64_t caps_stride;
  const double* inverse;
  float* found_inf;
  void *norms, *coefs;
};

// Without the GIL; None, or null with a Python error set.
PyObject* clip(const Call& call, const ClipRule& rule, const ClipMemory& memory) {
  return without_gil([&] {
    const Program& program = *call.program;
    const int threads = std::max(1, static_cast<int>(torch::stable::get_num_threads()));
    const CallRule whole{memory.caps, memory.caps_stride, memory.inverse, rule.eps, rule.nonfinite, program.wide};
    const Outcome outcome{rule.order, whole, inverse_of_scale(whole), memory.norms, memory.coefs};
    ClipQueue queue(call.pieces, program.tiles, outcome, threads);
    on_all_threads(program.tiles.bytes, [&](int thread) { queue.work(thread); });
    if (memory.found_inf != nullptr && queue.found_nonfinite()) *memory.found_inf = 1;
  });
}

PyObject* py_clip(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments arguments(values, count, 9,
                      "cpu_clip(program, addresses, rule, caps, caps_stride, inverse, found_inf, norms, coefs)");
  const Call call(arguments);
  const auto* const rule = arguments.capsule<ClipRule>();
  ClipMemory memory;
  memory.caps = arguments.pointer<const double>();
  memory.caps_stride = arguments.number();
  memory.inverse = arguments.pointer<const double>();
  memory.found_inf = arguments.pointer<float>();
  memory.norms = arguments.pointer<void>();
  memory.coefs = arguments.pointer<void>();
  if (arguments.failed()) return nullptr;
  if (memory.caps == nullptr || memory.norms == nullptr || memory.coefs == nullptr) {
    return raise(PyExc_ValueError, "caps, norms, coefs: null");
  }
  return clip(call, *rule, memory);
}

PyObject* py_clip_at_once(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments arguments(values, count, 10,
                      "cpu_clip_at_once(program, parameters, signature, last, rule, caps, inverse, found_inf, norms, "
                      "coefs)");
  const auto* const program = arguments.capsule<Program>();
  GradientLook look(arguments);
  const auto* const rule = arguments.capsule<ClipRule>();
  const ClipTensors tensors(arguments);
  if (arguments.failed()) return nullptr;
  if (!tensors.described || !look.finds_planned() || look.count() != program->gradients) Py_RETURN_NONE;
  if (!look.bump_versions()) return nullptr;
  PyObject* const done = clip(Call(program, look.addresses()), *rule,
                              {tensors.caps, tensors.caps_stride, tensors.inverse,
                               static_cast<float*>(tensors.found_inf), tensors.norms, tensors.coefs});
  if (done == nullptr) return nullptr;
  Py_DECREF(done);
  return look.kept();
}

}  // namespace

PyMethodDef methods[] = {
    method("cpu_program", &py_program),
    method("cpu_power_sums", &py_power_sums),
    method("cpu_scale", &py_scale),
    method("cpu_clip", &py_clip),
    method("cpu_clip_at_once", &py_clip_at_once),
    method("cpu_step_program", &py_step_program),
    method("cpu_clip_adamw", &py_clip_adamw),
    method("cpu_adamw", &py_adamw),
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace cwclip::cpu
