// What the CPU's functions of the Python module share: a bucket's program, threads, and letting go of the GIL.
#pragma once

#include "../common/signature.h"
#include "queue.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <string>
#include <vector>

namespace cwclip::cpu {

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
    if (!arguments.failed()) place(addresses);
  }
  Call(const Program* program, char* const* addresses) : program(program) { place(addresses); }

  const Program* program;
  std::vector<Piece> pieces;

 private:
  void place(char* const* addresses) {
    pieces = program->pieces;
    for (Piece& piece : pieces) piece.data = addresses[piece.gradient] + piece.offset * size_of(piece.dtype);
  }
};

// Runs work(i) once on each of torch's threads, i counting them, in one parallel region; on fewer where there is little
// to do for each.
//
// Not on threads of our own: after a backward pass torch's are still spinning, ready at once, and in the way of any
// others. A crew that waits on a condition variable took 0.7 ms longer for 91 MB right after an operator of torch
// (2 cores), and was faster only where torch's threads had gone to sleep.
template <class Work>
void on_all_threads(int64_t bytes, const Work& work) {
  constexpr int64_t kBytesPerThread = 512 * 1024;
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), bytes / kBytesPerThread);
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
  on_all_threads(tiles.bytes, [&](int) {
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

// Functions of other files, for the table in clip.cpp.
PyObject* py_step_program(PyObject*, PyObject* const* values, Py_ssize_t count);
PyObject* py_clip_adamw(PyObject*, PyObject* const* values, Py_ssize_t count);
PyObject* py_adamw(PyObject*, PyObject* const* values, Py_ssize_t count);

}  // namespace cwclip::cpu
