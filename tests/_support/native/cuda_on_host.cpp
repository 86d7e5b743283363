// csrc/cuda/ as a Python module for CPU tensors: what cwclip_kernels/backends/cuda.py calls, down to the kernels.
#include "../../../csrc/common/torch_objects.h"
#include "../../../csrc/cuda/current_stream.h"
#include "../../../csrc/cuda/program.h"
#include "blocks.h"

namespace {

using cwclip::on_host::machine;

// set_machine(processors, resident, seed)
PyObject* set_machine(PyObject*, PyObject* arguments) {
  unsigned long long seed;
  unsigned int resident;
  if (!PyArg_ParseTuple(arguments, "iIK", &machine.processors, &resident, &seed)) return nullptr;
  machine.resident = resident;
  machine.seed = seed;
  Py_RETURN_NONE;
}

PyObject* set_l2_bytes(PyObject*, PyObject* bytes) {
  machine.l2_bytes = static_cast<int>(PyLong_AsLong(bytes));
  if (PyErr_Occurred()) return nullptr;
  Py_RETURN_NONE;
}

PyObject* set_driver(PyObject*, PyObject* version) {
  machine.driver = static_cast<int>(PyLong_AsLong(version));
  if (PyErr_Occurred()) return nullptr;
  Py_RETURN_NONE;
}

PyObject* launches(PyObject*, PyObject*) { return PyLong_FromUnsignedLongLong(machine.launches); }

// set_stream(handle, number, capturing): the current one from now on
PyObject* set_stream(PyObject*, PyObject* arguments) {
  unsigned long long handle, number;
  int capturing;
  if (!PyArg_ParseTuple(arguments, "KKp", &handle, &number, &capturing)) return nullptr;
  machine.stream = reinterpret_cast<void*>(static_cast<uintptr_t>(handle));
  machine.stream_number = number;
  machine.capturing = capturing != 0;
  Py_RETURN_NONE;
}

// set_runs(bool): whether launches run kernels
PyObject* set_runs(PyObject*, PyObject* runs) {
  machine.runs = PyObject_IsTrue(runs) == 1;
  Py_RETURN_NONE;
}

// call_torch_through_python(bool)
PyObject* through_python(PyObject*, PyObject* always) {
  cwclip::call_torch_through_python(PyObject_IsTrue(always) == 1);
  Py_RETURN_NONE;
}

PyObject* calls_directly(PyObject*, PyObject*) { return PyBool_FromLong(cwclip::calls_torch_directly()); }

// partials_at(program): where the part of the workspace ends that is zero between calls
PyObject* partials_at(PyObject*, PyObject* capsule) {
  using cwclip::cuda::Program;
  const auto* const program = static_cast<const Program*>(PyCapsule_GetPointer(capsule, Program::kCapsule));
  return program == nullptr ? nullptr : PyLong_FromLongLong(program->partials_at);
}

PyMethodDef methods[] = {
    {"set_machine", &set_machine, METH_VARARGS, nullptr},
    {"set_l2_bytes", &set_l2_bytes, METH_O, nullptr},
    {"set_stream", &set_stream, METH_VARARGS, nullptr},
    {"set_runs", &set_runs, METH_O, nullptr},
    {"call_torch_through_python", &through_python, METH_O, nullptr},
    {"calls_torch_directly", &calls_directly, METH_NOARGS, nullptr},
    {"set_driver", &set_driver, METH_O, nullptr},
    {"launches", &launches, METH_NOARGS, nullptr},
    {"partials_at", &partials_at, METH_O, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

bool cwclip::cuda::find_current_stream(int32_t, void** stream) {
  *stream = machine.stream;
  return true;
}

PyMODINIT_FUNC PyInit_cwclip_cuda_on_host() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "cwclip_cuda_on_host", nullptr, -1, nullptr, nullptr, nullptr, nullptr,
                                   nullptr};
  if (!cwclip::find_torch()) return nullptr;
  PyObject* const module = PyModule_Create(&definition);
  if (module == nullptr) return nullptr;
  for (PyMethodDef* some : {cwclip::methods, cwclip::cuda::methods, methods}) PyModule_AddFunctions(module, some);
  return module;
}
