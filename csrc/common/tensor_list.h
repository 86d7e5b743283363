// Lists of tensors and their gradients, as Python passes them, compared with the signature that a plan was made for.
#pragma once

#include "signature.h"
#include "torch_objects.h"

namespace cwclip {

PyObject* py_signature_of(PyObject* module, PyObject* const* values, Py_ssize_t count);
PyObject* py_addresses_of(PyObject* module, PyObject* const* values, Py_ssize_t count);
PyObject* py_gradients_of(PyObject* module, PyObject* const* values, Py_ssize_t count);

// One call's look at its parameters' gradients, which it keeps alive.
class GradientLook {
 public:
  // Reads the arguments parameters, signature and last, which the caller has to outlive.
  explicit GradientLook(Arguments& arguments)
      : parameters_(arguments.tuple()), signature_(arguments.bytes()), last_(arguments.bytes_or_none()) {}
  GradientLook(const GradientLook&) = delete;
  ~GradientLook() {
    for (PyObject* const gradient : held_) Py_DECREF(gradient);
  }

  // Whether the gradients are those of the signature, require no grad and share no memory, so that they may be written to.
  // Otherwise false; never with a Python error set.
  bool finds_planned();

  char* const* addresses() const { return reinterpret_cast<char* const*>(addresses_.data()); }
  size_t count() const { return addresses_.size(); }

  // Tells autograd about the write to come; false with a Python error set if it refuses.
  bool bump_versions() const { return cwclip::bump_versions(written_); }

  // The addresses as Python keeps them: `last` itself if nothing has moved.
  PyObject* kept() const;

 private:
  static constexpr Py_ssize_t kBlock = 16;

  bool read();
  bool hold(const std::vector<PyObject*>& parameters, Py_ssize_t first, Py_ssize_t end);

  PyObject* parameters_;
  Bytes signature_;
  PyObject* last_;  // None, or bytes
  std::vector<PyObject*> held_;     // all gradients
  std::vector<PyObject*> written_;  // those that the signature describes
  std::vector<void*> addresses_;
  bool stayed_ = false;  // all where `last` has them
};

// What clipping at once takes: caps, inverse, found_inf, norms and coefs, as tensors; None for no inverse and no found_inf.
struct ClipTensors {
  explicit ClipTensors(Arguments& arguments);
  bool described;  // false where one is no plain tensor: a fake one has no address
  const double* caps;
  int64_t caps_stride;
  const double* inverse;
  void *found_inf, *norms, *coefs;
};

}  // namespace cwclip
