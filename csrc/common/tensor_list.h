// Lists of gradients, as Python passes them, without torch's dispatcher: some 20 ns a tensor instead of 200.
//
// Through DLPack's C exchange API (DLPack 1.3, torch >= 2.10), which reads address, dtype, device, shape and strides from
// a torch.Tensor and takes no reference.
#pragma once

#include "pieces.h"
#include "python.h"

namespace cwclip {

// Looks torch up. False with a Python error set if it isn't there.
bool find_torch();

PyObject* py_signature_of(PyObject* module, PyObject* const* values, Py_ssize_t count);
PyObject* py_addresses_of(PyObject* module, PyObject* const* values, Py_ssize_t count);

// What a program is made for: one bucket of gradients.
struct BucketPieces {
  std::vector<Piece> pieces;  // without data
  size_t gradients;           // whose addresses a call brings
  int64_t components;
  bool wide;  // norms and coefficients are float64
};

// Reads the arguments of cpu_program and cuda_program. Throws std::runtime_error if they don't fit together.
BucketPieces read_bucket(Arguments& arguments);

// One entry of a list of tensors, as its signature has it.
struct Entry {
  bool present;  // false for None and Ellipsis
  bool on_cpu;
  DType dtype;
  Shape shape;  // in the signature's own memory
};

// Throws std::runtime_error for a dtype that kernels don't serve.
std::vector<Entry> entries_of(Bytes signature);

// The stream that torch uses on a CUDA device now. False with a Python error set if that can't be told.
bool find_cuda_stream(int32_t device, void** stream);

}  // namespace cwclip
