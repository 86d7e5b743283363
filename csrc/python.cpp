// The index of the native side: the Python module _C, whose functions cwclip_kernels/_C.pyi documents. They take
// addresses, not tensors: what is called at every step, with hundreds of tensors, doesn't go through torch's dispatcher.
//
// Python's limited API and torch's stable ABI (torch/csrc/stable), so that one wheel serves every Python >= 3.10 and
// torch >= 2.10.
#include "common/python.h"
#include "common/torch_objects.h"

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  if (!cwclip::find_torch()) return nullptr;
  PyObject* const module = PyModule_Create(&definition);
  if (module == nullptr) return nullptr;
  PyModule_AddFunctions(module, cwclip::methods);
  PyModule_AddFunctions(module, cwclip::cpu::methods);
#if defined(CWCLIP_WITH_CUDA)
  PyModule_AddFunctions(module, cwclip::cuda::methods);
#endif
  if (!PyErr_Occurred()) return module;
  Py_DECREF(module);
  return nullptr;
}
