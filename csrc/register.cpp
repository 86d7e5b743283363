// The index of the native side: the functions of the Python module. They take addresses, not tensors: what is called at
// every step, with hundreds of tensors, doesn't go through torch's dispatcher.
//
// Python's limited API and torch's stable ABI (torch/csrc/stable), so that one wheel serves every Python >= 3.10 and
// torch >= 2.10.

#include <Python.h>

#include "cpu/calls.h"
#include "cuda/calls.h"
#include "tensors.h"

static PyMethodDef methods[] = {
    {"layout_of", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&cwclip::py_layout_of)), METH_FASTCALL,
     nullptr},
    {"form_of", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&cwclip::py_form_of)), METH_FASTCALL, nullptr},
    {"addresses_of", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&cwclip::py_addresses_of)),
     METH_FASTCALL, nullptr},
    {"cpu_program", &cwclip::cpu::py_program, METH_VARARGS, nullptr},
    {"cpu_power_sums", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&cwclip::cpu::py_power_sums)), METH_FASTCALL, nullptr},
    {"cpu_scale", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&cwclip::cpu::py_scale)), METH_FASTCALL, nullptr},
    {"cpu_clip", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&cwclip::cpu::py_clip)), METH_FASTCALL, nullptr},
#if defined(CWCLIP_WITH_CUDA)
    {"cuda_program", &cwclip::cuda::py_program, METH_VARARGS, nullptr},
    {"cuda_enqueue", &cwclip::cuda::py_enqueue, METH_VARARGS, nullptr},
    {"cuda_stream", &cwclip::cuda::py_stream, METH_O, nullptr},
    {"cuda_obstacle", &cwclip::cuda::py_obstacle, METH_O, nullptr},
#endif
    {nullptr, nullptr, 0, nullptr},
};

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
  return cwclip::find_torch() ? PyModule_Create(&module) : nullptr;
}
