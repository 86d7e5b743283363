// Torch's own C++ functions for .grad, requires_grad and version counters, found at run time.
//
// p.grad takes 50 to 60 ns through Python's descriptor, nearly all of it for guards that an exact Tensor doesn't need
// (__torch_function__, warnings); torch's functions behind it take 10. But neither their names nor where a tensor's
// object keeps the tensor is promised. So nothing is believed: TensorCalls::find() returns them only under a version of torch
// that has been tried, if all are there, and give the right answers for a parameter and its gradient. Where it doesn't,
// torch's Python functions serve, slower.
#pragma once

#include "python.h"

namespace cwclip {

// What came of looking: nothing yet, where a mode of torch (inference, fake tensors) is in the way.
enum class Finding { right, absent, unknown };

struct TensorCalls {
  using Impl = void*;           // c10::TensorImpl*
  using Tensor = const Impl*;   // const at::Tensor&: a tensor is a pointer to its TensorImpl

  int word;                                  // of a tensor's object, where the at::Tensor lies
  Tensor (*grad)(Impl);                      // c10::TensorImpl::grad() const; undefined if there is none
  bool (*requires_grad)(Impl);               // c10::TensorImpl::requires_grad() const
  PyObject* (*wrap)(Tensor);                 // THPVariable_Wrap: a new reference; None if undefined
  void (*bump_version)(Tensor);              // torch::autograd::impl::bump_version; throws for inference tensors

  Tensor tensor_of(PyObject* object) const { return reinterpret_cast<Tensor>(object) + word; }

  // Sets no Python error.
  Finding find(PyObject* torch);
};

}  // namespace cwclip
