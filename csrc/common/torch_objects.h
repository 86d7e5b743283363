// Torch's tensors, read from their Python objects without torch's dispatcher: some 20 ns a tensor instead of 200.
//
// Address, dtype, device, shape and strides come through DLPack's C exchange API (DLPack 1.3, torch >= 2.10), which takes
// no reference. For .grad, requires_grad and version counters see TensorCalls.
#pragma once

#include "dlpack.h"
#include "python.h"

#include <vector>

namespace cwclip {

// Looks torch up. False with a Python error set if it isn't there.
bool find_torch();

// torch.Tensor and torch.nn.Parameter, by find_torch().
inline PyObject *tensor_type = nullptr, *parameter_type = nullptr;

// Whether an object is exactly a Tensor or a Parameter, and of no other subclass.
inline bool is_plain(PyObject* object) {
  PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  return type == tensor_type || type == parameter_type;
}

// What a tensor looks like. False for anything but a Tensor or a Parameter, and for what torch can't describe.
bool describe(PyObject* entry, dlpack::Tensor* tensor, bool* is_parameter);

inline void* address_of(const dlpack::Tensor& tensor) { return static_cast<char*>(tensor.data) + tensor.byte_offset; }

// The word of a tensor's object that has the tensor's address: the first after the object's head, unless TensorCalls has
// found another. It serves hints alone here.
inline int word_of_tensor = sizeof(PyObject) / sizeof(void*);

// Asks for the memory of a tensor that is read soon: a list's tensors lie anywhere, and after a backward pass none is in
// cache. Where the word is another one, nothing is gained and nothing goes wrong.
inline void fetch_tensor(PyObject* object) {
  if (!is_plain(object)) return;
  const char* const tensor = reinterpret_cast<const char* const*>(object)[word_of_tensor];
  for (int line = 0; line < 4; ++line) __builtin_prefetch(tensor + 64 * line);
}

// A tensor's .grad, a new reference; null with a Python error set if it can't be read.
PyObject* gradient_of(PyObject* tensor);

// Whether any of these tensors, which are plain, requires grad: 1, 0, or -1 with a Python error set.
int any_requires_grad(const std::vector<PyObject*>& tensors);

// Tells autograd that these tensors, which are plain, are about to be written to. False with a Python error set if it
// refuses.
bool bump_versions(const std::vector<PyObject*>& tensors);

// Whether the three above call torch's C++ functions (TensorCalls); and, for tests, lets them never do so, or ask anew.
bool calls_torch_directly();
void call_torch_through_python(bool always);

const dlpack::ExchangeApi& exchange_api();

}  // namespace cwclip
