// csrc/cuda/ as a Python module for CPU tensors: what cwclip_kernels/backends/cuda.py calls, down to the kernels.
#include "../../../csrc/common/tensor_list.h"
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

PyObject* launches(PyObject*, PyObject*) { return PyLong_FromUnsignedLongLong(machine.launches); }

PyObject* stream(PyObject*, PyObject*) { return Py_BuildValue("(iO)", 0, Py_False); }

// partials_at(program): where the part of the workspace ends that is zero between calls
PyObject* partials_at(PyObject*, PyObject* capsule) {
  using cwclip::cuda::Program;
  const auto* const program = static_cast<const Program*>(PyCapsule_GetPointer(capsule, Program::kCapsule));
  return program == nullptr ? nullptr : PyLong_FromLongLong(program->partials_at);
}

PyMethodDef methods[] = {
    {"cuda_stream", &stream, METH_O, nullptr},
    {"set_machine", &set_machine, METH_VARARGS, nullptr},
    {"set_l2_bytes", &set_l2_bytes, METH_O, nullptr},
    {"launches", &launches, METH_NOARGS, nullptr},
    {"partials_at", &partials_at, METH_O, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

PyMODINIT_FUNC PyInit_cwclip_cuda_on_host() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "cwclip_cuda_on_host", nullptr, -1, nullptr, nullptr, nullptr, nullptr,
                                   nullptr};
  if (!cwclip::find_torch()) return nullptr;
  PyObject* const module = PyModule_Create(&definition);
  if (module == nullptr) return nullptr;
  for (PyMethodDef* some : {cwclip::methods, cwclip::cuda::methods, methods}) PyModule_AddFunctions(module, some);
  return module;
}
