// Lists of gradients, as Python passes them, without torch's dispatcher: some 20 ns a tensor instead of 200.
//
// Through DLPack's C exchange API (DLPack 1.3, torch >= 2.10), which reads address, dtype, device and layout from a
// torch.Tensor and takes no reference.
#pragma once

#include <Python.h>

#include "segments.h"

#include <cstdint>

namespace cwclip {

// Looks torch up. False with a Python error set if it isn't there.
bool find_torch();

// layout_of(grads: list) -> bytes. All that is static about strided tensors: dtypes, devices, shapes, strides. The list may
// hold None, where there is no gradient, and Ellipsis, where it doesn't matter what there is.
PyObject* py_layout_of(PyObject* module, PyObject* const* arguments, Py_ssize_t count);

// form_of(parameters: list) -> bytes | None. The same of parameters, to see whether they have been converted, moved or
// replaced. None if one isn't exactly a torch.Tensor or a Parameter, or isn't strided.
PyObject* py_form_of(PyObject* module, PyObject* const* arguments, Py_ssize_t count);

// addresses_of(grads: list, layout: bytes, last: bytes | None, writes: bool = True) -> bytes | None. Their addresses, int64
// each; `last` itself if they haven't moved. None if these tensors don't have that layout, aren't exactly torch.Tensor, or share
// memory although they are to be written to; `last` must be of a call with the same `writes`.
PyObject* py_addresses_of(PyObject* module, PyObject* const* arguments, Py_ssize_t count);

// The gradients that a layout describes, without data and components. Their shapes lie in the layout, which has to be
// aligned as Python's bytes are.
struct Gradients {
  std::vector<Segment> segments;
  std::vector<Shape> shapes;
};
Gradients gradients_of(const char* layout, size_t bytes);

// The stream that torch uses on a CUDA device now. False with a Python error set if that can't be told.
bool find_cuda_stream(int32_t device, void** stream);

}  // namespace cwclip
