#define PY_SSIZE_T_CLEAN
#include "calls.h"

#include "../tensors.h"
#include "launch.h"

#include <cmath>
#include <exception>
#include <string>
#include <utility>

namespace cwclip::cuda {
namespace {

PyObject* raise(PyObject* type, const std::string& message) {
  PyErr_SetString(type, message.c_str());
  return nullptr;
}

PyObject* raise_failure(const char* doing, const char* failure) {
  return raise(PyExc_RuntimeError, std::string("CUDA, ") + doing + ": " + failure);
}

template <class T>
T* pointer(unsigned long long address) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
}

}  // namespace

PyObject* py_program(PyObject*, PyObject* arguments) {
  const char *layout, *components, *numbers;
  Py_ssize_t layout_bytes, components_bytes, numbers_bytes;
  long long count;
  if (!PyArg_ParseTuple(arguments, "y#y#z#L:cuda_program", &layout, &layout_bytes, &components, &components_bytes,
                        &numbers, &numbers_bytes, &count)) {
    return nullptr;
  }
  constexpr Py_ssize_t kNumber = sizeof(int64_t);
  const Cuts cuts = {reinterpret_cast<const int64_t*>(components), components_bytes / kNumber,
                     reinterpret_cast<const int64_t*>(numbers), numbers_bytes / kNumber};
  try {
    Gradients gradients = gradients_of(layout, static_cast<size_t>(layout_bytes));
    const int32_t addresses = static_cast<int32_t>(gradients.segments.size());
    const std::vector<Segment> segments = cut(std::move(gradients.segments), gradients.shapes, cuts, count);
    std::string tables, program;
    write_program(segments, addresses, count, tables, program);
    return Py_BuildValue("(y#y#L)", tables.data(), static_cast<Py_ssize_t>(tables.size()), program.data(),
                         static_cast<Py_ssize_t>(program.size()),
                         static_cast<long long>(reinterpret_cast<const Program*>(program.data())->workspace_bytes));
  } catch (const std::exception& error) {
    return raise(PyExc_RuntimeError, error.what());
  }
}

PyObject* py_enqueue(PyObject*, PyObject* arguments) {
  int kind, nonfinite, wide, device;
  double norm_type, eps;
  const char *program, *addresses;
  Py_ssize_t program_bytes, addresses_bytes;
  unsigned long long tables, workspace, sums, norms, coefs, found_inf, caps, inverse, stream;
  long long caps_stride;
  if (!PyArg_ParseTuple(arguments, "idy#y#KKKKKKKLKdiiiK:cuda_enqueue", &kind, &norm_type, &program, &program_bytes,
                        &addresses, &addresses_bytes, &tables, &workspace, &sums, &norms, &coefs, &found_inf, &caps,
                        &caps_stride, &inverse, &eps, &nonfinite, &wide, &device, &stream)) {
    return nullptr;
  }
  const auto* const p = reinterpret_cast<const Program*>(program);
  if (program_bytes < static_cast<Py_ssize_t>(sizeof(Program)) ||
      addresses_bytes != p->gradients * static_cast<Py_ssize_t>(sizeof(void*))) {
    return raise(PyExc_ValueError, "addresses: expected one for each gradient of the program");
  }
  if (norm_type != 1 && norm_type != 2 && norm_type != HUGE_VAL) {
    return raise(PyExc_ValueError, "norm_type: expected 1, 2 or inf");
  }
  Request request;
  request.kind = static_cast<Kind>(kind);
  request.order = norm_type == 1 ? Order::one : norm_type == 2 ? Order::two : Order::inf;
  request.program = p;
  request.addresses = reinterpret_cast<void* const*>(addresses);
  request.tables = pointer<char>(tables);
  request.workspace = pointer<char>(workspace);
  request.results = {pointer<double>(sums), pointer<void>(norms), pointer<void>(coefs), pointer<uint32_t>(found_inf)};
  request.rule = {pointer<const double>(caps), caps_stride, pointer<const double>(inverse), eps,
                  static_cast<NonFinite>(nonfinite), wide != 0};
  request.device = device;
  request.stream = pointer<void>(stream);
  if (const char* const failure = enqueue(request)) return raise_failure("launching a kernel", failure);
  Py_RETURN_NONE;
}

PyObject* py_stream(PyObject*, PyObject* device) {
  const long index = PyLong_AsLong(device);
  if (index == -1 && PyErr_Occurred()) return nullptr;
  void* stream = nullptr;
  if (!find_cuda_stream(static_cast<int32_t>(index), &stream)) return nullptr;
  bool capturing = false;
  if (const char* const failure = find_capturing(static_cast<int>(index), stream, &capturing)) {
    return raise_failure("looking at a stream", failure);
  }
  return Py_BuildValue("(KO)", static_cast<unsigned long long>(reinterpret_cast<uintptr_t>(stream)),
                       capturing ? Py_True : Py_False);
}

PyObject* py_obstacle(PyObject*, PyObject* device) {
  const long index = PyLong_AsLong(device);
  if (index == -1 && PyErr_Occurred()) return nullptr;
  const char* const failure = find_obstacle(static_cast<int>(index));
  if (failure == nullptr) Py_RETURN_NONE;
  return PyUnicode_FromString(failure);
}

}  // namespace cwclip::cuda
