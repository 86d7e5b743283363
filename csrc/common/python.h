// What the functions of the Python module share: reading arguments, errors, capsules. cwclip_kernels/_C.pyi documents the
// functions themselves.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "types.h"

#include <exception>
#include <memory>
#include <string>

namespace cwclip {

// The functions of the module, in three tables that end with a null entry.
extern PyMethodDef methods[];
namespace cpu { extern PyMethodDef methods[]; }   // let go of the GIL while they work
namespace cuda { extern PyMethodDef methods[]; }  // wait for nothing; the device has to be torch's current one

// Sets a Python error; null, to be returned.
inline PyObject* raise(PyObject* type, const std::string& message) {
  PyErr_SetString(type, message.c_str());
  return nullptr;
}

using FastCall = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);

inline PyMethodDef method(const char* name, FastCall function) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, nullptr};
}

// A capsule owns a T; T::kCapsule is its name.
template <class T>
PyObject* capsule_of(std::unique_ptr<T> owned) {
  PyObject* const capsule = PyCapsule_New(owned.get(), T::kCapsule, [](PyObject* self) {
    delete static_cast<T*>(PyCapsule_GetPointer(self, T::kCapsule));
  });
  if (capsule != nullptr) owned.release();
  return capsule;
}

struct Bytes {
  const char* data;
  Py_ssize_t size;
  template <class T>
  const T* as() const { return reinterpret_cast<const T*>(data); }
};

// The positional arguments of a call, read one after another. Once one isn't as expected, or their number isn't,
// failed() is true, a Python error is set, and everything read is zero.
class Arguments {
 public:
  Arguments(PyObject* const* values, Py_ssize_t count, Py_ssize_t expected, const char* usage) : next_(values) {
    if (count != expected) fail(PyExc_TypeError, std::string("expected ") + usage);
  }

  bool failed() const { return failed_; }

  void fail(PyObject* type, const std::string& message) {
    if (!failed_) raise(type, message);
    failed_ = true;
  }

  double real() { return read(&PyFloat_AsDouble); }
  int64_t number() { return read(&PyLong_AsLongLong); }
  bool flag() { return read(&PyObject_IsTrue) == 1; }

  template <class T>
  T* pointer() { return reinterpret_cast<T*>(static_cast<uintptr_t>(read(&PyLong_AsUnsignedLongLong))); }

  template <class T>
  T* capsule() {
    return read([](PyObject* value) { return static_cast<T*>(PyCapsule_GetPointer(value, T::kCapsule)); });
  }

  Bytes bytes(bool or_none = false) {
    return read([&](PyObject* value) {
      Bytes bytes = {};
      char* data = nullptr;
      if (or_none && value == Py_None) return bytes;
      if (PyBytes_AsStringAndSize(value, &data, &bytes.size) == 0) bytes.data = data;
      return bytes;
    });
  }

  PyObject* list() {
    return read([&](PyObject* value) {
      if (!PyList_Check(value)) raise(PyExc_TypeError, "expected a list of tensors");
      return value;
    });
  }

  PyObject* tuple() {
    return read([&](PyObject* value) {
      if (!PyTuple_Check(value)) raise(PyExc_TypeError, "expected a tuple of tensors");
      return value;
    });
  }

  PyObject* dict() {
    return read([&](PyObject* value) {
      if (!PyDict_Check(value)) raise(PyExc_TypeError, "expected a dict");
      return value;
    });
  }

  // Any object; the caller looks at it.
  PyObject* object() {
    return read([](PyObject* value) { return value; });
  }

  // Bytes as an object, or None.
  PyObject* bytes_or_none() {
    return read([&](PyObject* value) {
      if (value != Py_None && !PyBytes_Check(value)) raise(PyExc_TypeError, "expected bytes, or None");
      return value;
    });
  }

  // Addresses of as many gradients as a program has.
  char* const* addresses(size_t gradients) {
    const Bytes read = bytes();
    if (read.size != static_cast<Py_ssize_t>(gradients * sizeof(void*))) {
      fail(PyExc_ValueError, "addresses: expected one for each gradient of the program");
    }
    return read.as<char*>();
  }

  Order order() {
    const double p = real();
    if (p != 1 && p != 2 && p != __builtin_inf()) fail(PyExc_ValueError, "norm_type: expected 1, 2 or inf");
    return p == 1 ? Order::one : p == 2 ? Order::two : Order::inf;
  }

 private:
  template <class Read>
  auto read(const Read& convert) -> decltype(convert(nullptr)) {
    if (failed_) return {};
    auto value = convert(*next_++);
    failed_ = PyErr_Occurred() != nullptr;
    return value;
  }

  PyObject* const* next_;
  bool failed_ = false;
};

// Calls work(), whose exceptions become RuntimeError.
template <class Work>
PyObject* guarded(const Work& work) {
  try {
    return work();
  } catch (const std::exception& error) {
    return raise(PyExc_RuntimeError, error.what());
  }
}

}  // namespace cwclip
