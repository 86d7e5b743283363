// The index of the native side: the Python module, every operator's schema, every implementation.
//
// All through torch's stable ABI (torch/csrc/stable), so that one wheel serves every Python >= 3.10 and
// torch >= 2.10. Arguments as in cwclip_kernels/backends/cpu.py.

#include <Python.h>

#include "cpu/ops.h"
#include "cuda/calls.h"
#include "tensors.h"

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(cwclip_kernels, m) {
  m.def(
      "clip_(Tensor(a!)[] grads, Tensor components, Tensor? cuts, int count, Tensor caps, Tensor? inverse, "
      "Tensor(b!)? found_inf, float norm_type, float eps, int nonfinite) -> (Tensor norms, Tensor coefs)");
  m.def("power_sums(Tensor[] grads, Tensor components, Tensor? cuts, int count, float norm_type) -> Tensor");
  m.def("scale_(Tensor(a!)[] grads, Tensor components, Tensor? cuts, Tensor coefs, bool zero_fill) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(cwclip_kernels, CPU, m) {
  m.impl("clip_", TORCH_BOX(&cwclip::cpu::clip_));
  m.impl("power_sums", TORCH_BOX(&cwclip::cpu::power_sums));
  m.impl("scale_", TORCH_BOX(&cwclip::cpu::scale_));
}

// What is called too often, with too many tensors, to go through torch's dispatcher.
static PyMethodDef methods[] = {
    {"layout_of", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&cwclip::py_layout_of)), METH_FASTCALL,
     nullptr},
    {"form_of", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&cwclip::py_form_of)), METH_FASTCALL, nullptr},
    {"addresses_of", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&cwclip::py_addresses_of)),
     METH_FASTCALL, nullptr},
#if defined(CWCLIP_WITH_CUDA)
    {"cuda_program", &cwclip::cuda::py_program, METH_VARARGS, nullptr},
    {"cuda_enqueue", &cwclip::cuda::py_enqueue, METH_VARARGS, nullptr},
    {"cuda_stream", &cwclip::cuda::py_stream, METH_O, nullptr},
    {"cuda_obstacle", &cwclip::cuda::py_obstacle, METH_O, nullptr},
#endif
    {nullptr, nullptr, 0, nullptr},
};

// Importing the module runs the registrations above, too.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
  return cwclip::find_torch() ? PyModule_Create(&module) : nullptr;
}
