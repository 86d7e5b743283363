// The index of the native side: the Python module, every operator's schema, every implementation.
//
// All through torch's stable ABI (torch/csrc/stable), so that one wheel serves every Python >= 3.10 and
// torch >= 2.10. Arguments as in cwclip_kernels/backends/native.py.

#include <Python.h>

#include "cpu/ops.h"

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(cwclip_kernels, m) {
  m.def(
      "clip_(Tensor(a!)[] grads, Tensor components, int count, Tensor caps, float norm_type, float eps, "
      "int nonfinite) -> (Tensor norms, Tensor coefs)");
  m.def("power_sums(Tensor[] grads, Tensor components, int count, float norm_type) -> Tensor");
  m.def("scale_(Tensor(a!)[] grads, Tensor components, Tensor coefs, bool zero_fill) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(cwclip_kernels, CPU, m) {
  m.impl("clip_", TORCH_BOX(&cwclip::cpu::clip_));
  m.impl("power_sums", TORCH_BOX(&cwclip::cpu::power_sums));
  m.impl("scale_", TORCH_BOX(&cwclip::cpu::scale_));
}

// Importing the module runs the registrations above; it has nothing else in it.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
