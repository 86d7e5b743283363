// csrc/cuda/ as a Python module for CPU tensors: what cwclip_kernels/backends/cuda.py calls, down to the kernels.
#include "../../../csrc/cuda/calls.h"
#include "../../../csrc/tensors.h"
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

PyObject* launches(PyObject*, PyObject*) { return PyLong_FromUnsignedLongLong(machine.launches); }

PyObject* stream(PyObject*, PyObject*) { return Py_BuildValue("(iO)", 0, Py_False); }

PyMethodDef methods[] = {
    {"layout_of", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&cwclip::py_layout_of)), METH_FASTCALL,
     nullptr},
    {"form_of", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&cwclip::py_form_of)), METH_FASTCALL, nullptr},
    {"addresses_of", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&cwclip::py_addresses_of)),
     METH_FASTCALL, nullptr},
    {"cuda_program", &cwclip::cuda::py_program, METH_VARARGS, nullptr},
    {"cuda_enqueue", &cwclip::cuda::py_enqueue, METH_VARARGS, nullptr},
    {"cuda_stream", &stream, METH_O, nullptr},
    {"cuda_obstacle", &cwclip::cuda::py_obstacle, METH_O, nullptr},
    {"set_machine", &set_machine, METH_VARARGS, nullptr},
    {"launches", &launches, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

PyMODINIT_FUNC PyInit_cwclip_cuda_on_host() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "cwclip_cuda_on_host", nullptr, -1, methods, nullptr, nullptr, nullptr,
                               nullptr};
  return cwclip::find_torch() ? PyModule_Create(&module) : nullptr;
}
