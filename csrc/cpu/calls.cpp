#define PY_SSIZE_T_CLEAN
#include "calls.h"

#include "../segments.h"
#include "../tensors.h"
#include "queue.h"
#include "strided.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <exception>
#include <memory>
#include <string>
#include <utility>

namespace cwclip::cpu {
namespace {

constexpr const char* kCapsule = "cwclip_kernels.cpu_program";

// A bucket's static side. Segments have no addresses yet: each call has a copy of them, so that calls may overlap.
struct Program {
  std::vector<Segment> segments;
  Tiles tiles;
  int64_t count;
  size_t gradients;
};

PyObject* raise(PyObject* type, const std::string& message) {
  PyErr_SetString(type, message.c_str());
  return nullptr;
}

void forget(PyObject* capsule) { delete static_cast<Program*>(PyCapsule_GetPointer(capsule, kCapsule)); }

// The program and the pieces at these addresses; null with an error set if they don't belong together.
const Program* open(PyObject* capsule, PyObject* addresses, std::vector<Segment>* segments) {
  const auto* const program = static_cast<const Program*>(PyCapsule_GetPointer(capsule, kCapsule));
  if (program == nullptr) return nullptr;
  const Py_ssize_t bytes = PyBytes_Check(addresses) ? PyBytes_Size(addresses) : -1;
  if (bytes != static_cast<Py_ssize_t>(program->gradients * sizeof(void*))) {
    raise(PyExc_ValueError, "addresses: expected one for each gradient of the program");
    return nullptr;
  }
  const auto* const places = reinterpret_cast<char* const*>(PyBytes_AsString(addresses));
  *segments = program->segments;
  for (Segment& segment : *segments) {
    segment.data = places[segment.gradient] + segment.offset * size_of(segment.dtype);
  }
  return program;
}

template <class T>
T* pointer(PyObject* address) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(PyLong_AsUnsignedLongLong(address)));
}

bool order_of(PyObject* norm_type, Order* order) {
  const double p = PyFloat_AsDouble(norm_type);
  *order = p == 1 ? Order::one : p == 2 ? Order::two : Order::inf;
  if (p == 1 || p == 2 || p == HUGE_VAL) return true;
  if (!PyErr_Occurred()) raise(PyExc_ValueError, "norm_type: expected 1, 2 or inf");
  return false;
}

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

PyObject* refuse(const char* expected) { return raise(PyExc_TypeError, expected); }

void store(const std::vector<double>& values, void* result, bool wide) {
  if (wide) {
    std::copy(values.begin(), values.end(), static_cast<double*>(result));
  } else {
    std::transform(values.begin(), values.end(), static_cast<float*>(result),
                   [](double v) { return static_cast<float>(v); });
  }
}

}  // namespace

PyObject* py_program(PyObject*, PyObject* arguments) {
  const char *layout, *components, *numbers;
  Py_ssize_t layout_bytes, components_bytes, numbers_bytes;
  long long count;
  if (!PyArg_ParseTuple(arguments, "y#y#z#L:cpu_program", &layout, &layout_bytes, &components, &components_bytes,
                        &numbers, &numbers_bytes, &count)) {
    return nullptr;
  }
  constexpr Py_ssize_t kNumber = sizeof(int64_t);
  const Cuts cuts = {reinterpret_cast<const int64_t*>(components), components_bytes / kNumber,
                     reinterpret_cast<const int64_t*>(numbers), numbers_bytes / kNumber};
  try {
    if (count < 0 || count > INT32_MAX) throw std::runtime_error("count: expected a number from 0 to 2^31 - 1");
    Gradients gradients = gradients_of(layout, static_cast<size_t>(layout_bytes));
    const size_t addresses = gradients.segments.size();
    std::vector<Segment> segments = cut(std::move(gradients.segments), gradients.shapes, cuts, count);
    Tiles tiles(segments, count);
    auto program = std::unique_ptr<Program>(new Program{std::move(segments), std::move(tiles), count, addresses});
    PyObject* const capsule = PyCapsule_New(program.get(), kCapsule, &forget);
    if (capsule != nullptr) program.release();
    return capsule;
  } catch (const std::exception& error) {
    return raise(PyExc_RuntimeError, error.what());
  }
}

PyObject* py_power_sums(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 4) return refuse("cpu_power_sums(program, addresses, norm_type, sums)");
  std::vector<Segment> segments;
  Order order;
  const Program* const program = open(arguments[0], arguments[1], &segments);
  if (program == nullptr || !order_of(arguments[2], &order)) return nullptr;
  auto* const sums = pointer<double>(arguments[3]);
  if (PyErr_Occurred()) return nullptr;
  return without_gil([&] {
    const Tiles& tiles = program->tiles;
    std::vector<double> partials(tiles.tiles.size());
    for_each_tile(tiles, [&](int64_t i) {
      const Tile& tile = tiles.tiles[i];
      partials[i] = power_sum(segments[tile.segment], tile.start, tile.count, order);
    });
    for (int64_t c = 0; c < program->count; ++c) {
      sums[c] = combine(partials.data() + tiles.first[c], tiles.first[c + 1] - tiles.first[c], order);
    }
  });
}

PyObject* py_scale(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 4) return refuse("cpu_scale(program, addresses, factors, zero_fill)");
  std::vector<Segment> segments;
  const Program* const program = open(arguments[0], arguments[1], &segments);
  if (program == nullptr) return nullptr;
  const auto* const factors = pointer<const double>(arguments[2]);
  const bool zero_fill = PyObject_IsTrue(arguments[3]) == 1;
  if (PyErr_Occurred()) return nullptr;
  return without_gil([&] {
    for_each_tile(program->tiles, [&](int64_t i) {
      const Tile& tile = program->tiles.tiles[i];
      const double factor = factors[tile.component];
      if (factor == 1) return;
      scale(segments[tile.segment], tile.start, tile.count, factor, zero_fill && factor == 0);
    });
  });
}

PyObject* py_clip(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 12) {
    return refuse(
        "cpu_clip(program, addresses, norm_type, eps, nonfinite, wide, caps, caps_stride, inverse, found_inf, norms, "
        "coefs)");
  }
  std::vector<Segment> segments;
  Order order;
  const Program* const program = open(arguments[0], arguments[1], &segments);
  if (program == nullptr || !order_of(arguments[2], &order)) return nullptr;
  const double eps = PyFloat_AsDouble(arguments[3]);
  const long nonfinite = PyLong_AsLong(arguments[4]);
  const bool wide = PyObject_IsTrue(arguments[5]) == 1;
  const Rule rule{pointer<const double>(arguments[6]), PyLong_AsLongLong(arguments[7]), pointer<const double>(arguments[8]),
                  eps, static_cast<NonFinite>(nonfinite), wide};
  auto* const found_inf = pointer<float>(arguments[9]);
  void* const norms = pointer<void>(arguments[10]);
  void* const coefs = pointer<void>(arguments[11]);
  if (PyErr_Occurred()) return nullptr;
  if (nonfinite < 0 || nonfinite > 2) return raise(PyExc_ValueError, "nonfinite: expected 0, 1 or 2");
  if (rule.caps == nullptr || norms == nullptr || coefs == nullptr) return raise(PyExc_ValueError, "caps, norms, coefs: null");
  return without_gil([&] {
    std::vector<double> wide_norms(program->count), wide_coefs(program->count);
    const int threads = std::max(1, static_cast<int>(torch::stable::get_num_threads()));
    ClipQueue queue(segments, program->tiles, order, rule, wide_norms.data(), wide_coefs.data(), threads);
    on_all_threads(program->tiles, [&](int thread) { queue.work(thread); });
    if (found_inf != nullptr && queue.found_nonfinite()) *found_inf = 1;
    store(wide_norms, norms, wide);
    store(wide_coefs, coefs, wide);
  });
}

}  // namespace cwclip::cpu
