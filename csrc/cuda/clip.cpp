// The GPU's functions of the Python module. Memory on the device comes as addresses.
#include "../common/tensor_list.h"
#include "current_stream.h"
#include "launch.h"

namespace cwclip::cuda {
namespace {

PyObject* raise_failure(const char* doing, const char* failure) {
  return raise(PyExc_RuntimeError, std::string("CUDA, ") + doing + ": " + failure);
}

PyObject* py_program(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments arguments(values, count, 5, "cuda_program(signature, components, cuts, count, wide)");
  return guarded([&]() -> PyObject* {
    const BucketPieces bucket = read_bucket(arguments);
    if (arguments.failed()) return nullptr;
    std::string tables;
    auto program = std::make_unique<Program>(
        make_program(bucket.pieces, static_cast<int32_t>(bucket.gradients), bucket.components, tables));
    program->wide = bucket.wide;
    const long long workspace_bytes = program->workspace_bytes;
    PyObject* const capsule = capsule_of(std::move(program));
    if (capsule == nullptr) return nullptr;
    return Py_BuildValue("(Ny#L)", capsule, tables.data(), static_cast<Py_ssize_t>(tables.size()), workspace_bytes);
  });
}

PyObject* py_place(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments arguments(values, count, 3, "cuda_place(program, tables, device)");
  auto* const program = arguments.capsule<Program>();
  auto* const tables = arguments.pointer<char>();
  const int64_t device = arguments.number();
  if (arguments.failed()) return nullptr;
  if (const char* const failure = place(*program, tables, static_cast<int>(device))) {
    return raise_failure("asking what a device is like", failure);
  }
  Py_RETURN_NONE;
}

constexpr const char* kNotPlaced = "program: its tables are on no device yet; call cuda_place";

// What every call begins with: program, addresses, stream, workspace.
Request request_of(Arguments& arguments, Kind kind) {
  Request request = {};
  request.kind = kind;
  request.program = arguments.capsule<Program>();
  request.addresses = arguments.addresses(request.program == nullptr ? 0 : request.program->gradients);
  request.stream = arguments.pointer<void>();
  request.workspace = arguments.pointer<char>();
  if (!arguments.failed() && request.program->tables == nullptr) {
    arguments.fail(PyExc_ValueError, kNotPlaced);
  }
  return request;
}

// Torch's current stream; false with a Python error set if that can't be told.
bool find_stream(int device, StreamState* stream) {
  if (!find_current_stream(device, &stream->handle)) return false;
  const char* const failure = find_state(device, stream);
  return failure == nullptr || raise_failure("looking at a stream", failure) != nullptr;
}

PyObject* enqueued(const Arguments& arguments, const Request& request) {
  if (arguments.failed()) return nullptr;
  if (const char* const failure = enqueue(request)) return raise_failure("launching a kernel", failure);
  Py_RETURN_NONE;
}

PyObject* py_power_sums(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments arguments(values, count, 6, "cuda_power_sums(program, addresses, stream, workspace, norm_type, sums)");
  Request request = request_of(arguments, Kind::power_sums);
  request.order = arguments.order();
  request.results.sums = arguments.pointer<double>();
  return enqueued(arguments, request);
}

// What is multiplied with given factors takes these, whether they are float64, and whether 0 erases inf and NaN.
void read_factors(Arguments& arguments, Request& request) {
  request.results.coefs = arguments.pointer<void>();
  request.rule.wide = arguments.flag();
  request.rule.nonfinite = arguments.flag() ? NonFinite::zero : NonFinite::propagate;
}

PyObject* py_scale(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments arguments(values, count, 7, "cuda_scale(program, addresses, stream, workspace, coefs, wide, zero_fill)");
  Request request = request_of(arguments, Kind::scale);
  read_factors(arguments, request);
  return enqueued(arguments, request);
}

// What clipping takes: rule, caps, caps_stride, inverse, found_inf, norms, coefs.
void read_clip(Arguments& arguments, Request& request) {
  const auto* const rule = arguments.capsule<ClipRule>();
  const auto* const caps = arguments.pointer<const double>();
  const int64_t caps_stride = arguments.number();
  const auto* const inverse = arguments.pointer<const double>();
  request.results.found_inf = arguments.pointer<uint32_t>();
  request.results.norms = arguments.pointer<void>();
  request.results.coefs = arguments.pointer<void>();
  if (arguments.failed()) return;
  request.order = rule->order;
  request.rule = {caps, caps_stride, inverse, rule->eps, rule->nonfinite, request.program->wide};
}

PyObject* py_clip(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments arguments(values, count, 11,
                      "cuda_clip(program, addresses, stream, workspace, rule, caps, caps_stride, inverse, found_inf, "
                      "norms, coefs)");
  Request request = request_of(arguments, Kind::clip);
  read_clip(arguments, request);
  return enqueued(arguments, request);
}

// The workspace that Python keeps for a stream, under its number; null if there is none, with no Python error set.
char* workspace_for(PyObject* workspaces, unsigned long long number) {
  PyObject* const key = PyLong_FromUnsignedLongLong(number);
  PyObject* const found = key == nullptr ? nullptr : PyDict_GetItemWithError(workspaces, key);
  Py_XDECREF(key);
  PyErr_Clear();
  dlpack::Tensor workspace;
  bool is_parameter;
  const bool described = found != nullptr && describe(found, &workspace, &is_parameter);
  return described ? static_cast<char*>(address_of(workspace)) : nullptr;
}

PyObject* py_clip_at_once(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments arguments(values, count, 11,
                      "cuda_clip_at_once(program, workspaces, parameters, signature, last, rule, caps, inverse, "
                      "found_inf, norms, coefs)");
  Request request = {};
  request.kind = Kind::clip;
  request.program = arguments.capsule<Program>();
  PyObject* const workspaces = arguments.dict();
  GradientLook look(arguments);
  const auto* const rule = arguments.capsule<ClipRule>();
  const ClipTensors tensors(arguments);
  if (arguments.failed()) return nullptr;
  const Program& program = *request.program;
  StreamState stream = {};
  if (program.tables == nullptr) return raise(PyExc_ValueError, kNotPlaced);
  if (!find_stream(program.device, &stream)) return nullptr;
  request.workspace = stream.capturing ? nullptr : workspace_for(workspaces, stream.number);
  if (request.workspace == nullptr || !tensors.described || !look.finds_planned() ||
      look.count() != static_cast<size_t>(program.gradients)) {
    Py_RETURN_NONE;
  }
  if (!look.bump_versions()) return nullptr;
  request.stream = stream.handle;
  request.addresses = look.addresses();
  request.order = rule->order;
  request.rule = {tensors.caps, tensors.caps_stride, tensors.inverse, rule->eps, rule->nonfinite, program.wide};
  request.results.found_inf = static_cast<uint32_t*>(tensors.found_inf);
  request.results.norms = tensors.norms;
  request.results.coefs = tensors.coefs;
  if (const char* const failure = enqueue(request)) return raise_failure("launching a kernel", failure);
  return look.kept();
}

PyObject* py_step_table(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments arguments(values, count, 2, "cuda_step_table(program, stepped)");
  const auto* const program = arguments.capsule<Program>();
  const Bytes stepped = arguments.bytes();
  if (arguments.failed()) return nullptr;
  if (stepped.size != static_cast<Py_ssize_t>(sizeof(Stepped)) * program->gradients) {
    return raise(PyExc_ValueError, "stepped: expected 9 numbers for each gradient of the program");
  }
  return guarded([&] {
    const std::string table = make_step_table(*program, stepped.as<Stepped>());
    return PyBytes_FromStringAndSize(table.data(), static_cast<Py_ssize_t>(table.size()));
  });
}

// What a step takes first: table, rules, skip.
void read_step(Arguments& arguments, Request& request) {
  request.step.table = arguments.pointer<char>();
  const Bytes rules = arguments.bytes();
  request.step.skip = arguments.pointer<const float>();
  request.step.rules = rules.as<AdamWRule>();
  request.step.count = static_cast<size_t>(rules.size) / sizeof(AdamWRule);
  if (rules.size % static_cast<Py_ssize_t>(sizeof(AdamWRule)) != 0) {
    arguments.fail(PyExc_ValueError, "rules: expected 64 bytes for each");
  }
}

PyObject* py_adamw(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments arguments(values, count, 10,
                      "cuda_adamw(program, addresses, stream, workspace, table, rules, skip, factors, wide, zero_fill)");
  Request request = request_of(arguments, Kind::step);
  read_step(arguments, request);
  read_factors(arguments, request);
  return enqueued(arguments, request);
}

PyObject* py_clip_adamw(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments arguments(values, count, 14,
                      "cuda_clip_adamw(program, addresses, stream, workspace, table, rules, skip, rule, caps, "
                      "caps_stride, inverse, found_inf, norms, coefs)");
  Request request = request_of(arguments, Kind::clip_step);
  read_step(arguments, request);
  read_clip(arguments, request);
  return enqueued(arguments, request);
}

PyObject* py_stream(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments arguments(values, count, 1, "cuda_stream(device)");
  const int device = static_cast<int>(arguments.number());
  StreamState stream = {};
  if (arguments.failed() || !find_stream(device, &stream)) return nullptr;
  return Py_BuildValue("(KKO)", static_cast<unsigned long long>(reinterpret_cast<uintptr_t>(stream.handle)),
                       stream.number, stream.capturing ? Py_True : Py_False);
}

PyObject* py_obstacle(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments arguments(values, count, 1, "cuda_obstacle(device)");
  const int device = static_cast<int>(arguments.number());
  if (arguments.failed()) return nullptr;
  const std::string obstacle = find_obstacle(device);
  if (obstacle.empty()) Py_RETURN_NONE;
  return PyUnicode_FromString(obstacle.c_str());
}

}  // namespace

PyMethodDef methods[] = {
    method("cuda_program", &py_program),
    method("cuda_place", &py_place),
    method("cuda_power_sums", &py_power_sums),
    method("cuda_scale", &py_scale),
    method("cuda_clip", &py_clip),
    method("cuda_clip_at_once", &py_clip_at_once),
    method("cuda_step_table", &py_step_table),
    method("cuda_adamw", &py_adamw),
    method("cuda_clip_adamw", &py_clip_adamw),
    method("cuda_stream", &py_stream),
    method("cuda_obstacle", &py_obstacle),
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace cwclip::cuda
