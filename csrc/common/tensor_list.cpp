#include "tensor_list.h"

#include <algorithm>
#include <string>

namespace cwclip {
namespace {

// Asks for the memory of entries further on.
void fetch_ahead(PyObject* list, Py_ssize_t i, Py_ssize_t length) {
  constexpr Py_ssize_t kObject = 16, kTensor = 8;
  if (i + kObject < length) __builtin_prefetch(PyList_GetItem(list, i + kObject));
  if (i + kTensor < length) fetch_tensor(PyList_GetItem(list, i + kTensor));
}

template <class T>
void append(std::string& bytes, const T* values, size_t count) {
  if (count != 0) bytes.append(reinterpret_cast<const char*>(values), count * sizeof(T));
}

// Whether a Python object holds these addresses already.
bool holds(PyObject* last, const std::vector<void*>& addresses) {
  char* data = nullptr;
  Py_ssize_t size = 0;
  if (last == Py_None || PyBytes_AsStringAndSize(last, &data, &size) != 0) return false;
  const size_t bytes = addresses.size() * sizeof(void*);
  return static_cast<size_t>(size) == bytes && (bytes == 0 || std::memcmp(data, addresses.data(), bytes) == 0);
}

PyObject* bytes_of(const std::vector<void*>& addresses) {
  return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(addresses.data()),
                                   static_cast<Py_ssize_t>(addresses.size() * sizeof(void*)));
}

// Whether gradients with this signature share memory, or can't be cut into pieces, which says whether they do.
bool may_share_memory(Bytes signature, const std::vector<void*>& addresses) {
  try {
    std::vector<Piece> pieces = gradients_of(signature).pieces;
    for (size_t i = 0; i < pieces.size(); ++i) pieces[i].data = addresses[i];
    return share_memory(pieces);
  } catch (const std::exception&) {
    return true;
  }
}

}  // namespace

PyObject* py_signature_of(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments arguments(values, count, 1, "signature_of(tensors)");
  PyObject* const tensors = arguments.list();
  if (arguments.failed()) return nullptr;
  std::string signature;
  const Py_ssize_t length = PyList_Size(tensors);
  for (Py_ssize_t i = 0; i < length; ++i) {
    PyObject* const entry = PyList_GetItem(tensors, i);
    Head head = {entry == Py_None ? kAbsent : kIgnored, 0, 0, 0, 0, 0};
    dlpack::Tensor tensor = {};
    if (entry != Py_None && entry != Py_Ellipsis) {
      bool is_parameter;
      if (!describe(entry, &tensor, &is_parameter)) Py_RETURN_NONE;
      head = head_of(tensor, is_parameter);
    }
    append(signature, &head, 1);
    append(signature, tensor.sizes, tensor.dims);
    append(signature, tensor.strides, tensor.dims);
  }
  return PyBytes_FromStringAndSize(signature.data(), static_cast<Py_ssize_t>(signature.size()));
}

PyObject* py_addresses_of(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments arguments(values, count, 4, "addresses_of(grads, signature, last, writes)");
  PyObject* const grads = arguments.list();
  const Bytes signature = arguments.bytes();
  PyObject* const last = arguments.bytes_or_none();
  const bool writes = arguments.flag();
  if (arguments.failed()) return nullptr;
  SignatureReader reader(signature);
  const Py_ssize_t length = PyList_Size(grads);
  std::vector<void*> addresses;
  addresses.reserve(length);
  for (Py_ssize_t i = 0; i < length; ++i) {
    PyObject* const grad = PyList_GetItem(grads, i);
    fetch_ahead(grads, i, length);
    const int32_t kind = reader.at_end() ? kAbsent : reader.kind();
    if (kind == kIgnored || kind == kAbsent) {
      if (reader.at_end() || (kind == kAbsent && grad != Py_None)) Py_RETURN_NONE;
      reader.skip();
      continue;
    }
    dlpack::Tensor tensor;
    bool is_parameter;
    if (!describe(grad, &tensor, &is_parameter) || !reader.matches(tensor, is_parameter)) Py_RETURN_NONE;
    addresses.push_back(address_of(tensor));
  }
  if (!reader.at_end()) Py_RETURN_NONE;
  if (holds(last, addresses)) {
    Py_INCREF(last);
    return last;
  }
  if (writes && may_share_memory(signature, addresses)) Py_RETURN_NONE;
  return bytes_of(addresses);
}

PyObject* py_gradients_of(PyObject*, PyObject* const* values, Py_ssize_t count) {
  Arguments arguments(values, count, 1, "gradients_of(parameters)");
  PyObject* const parameters = arguments.tuple();
  if (arguments.failed()) return nullptr;
  const Py_ssize_t length = PyTuple_Size(parameters);
  PyObject* const gradients = PyList_New(length);
  for (Py_ssize_t i = 0; gradients != nullptr && i < length; ++i) {
    PyObject* const gradient = gradient_of(PyTuple_GetItem(parameters, i));
    if (gradient == nullptr) {
      Py_DECREF(gradients);
      return nullptr;
    }
    PyList_SetItem(gradients, i, gradient);
  }
  return gradients;
}

bool GradientLook::finds_planned() {
  bool found = read() && any_requires_grad(written_) == 0;
  if (found) {
    stayed_ = holds(last_, addresses_);
    found = stayed_ || !may_share_memory(signature_, addresses_);
  }
  PyErr_Clear();  // of an attribute that can't be read: Python meets it again, and raises
  return found;
}

bool GradientLook::read() {
  SignatureReader reader(signature_);
  const Py_ssize_t length = PyTuple_Size(parameters_);
  std::vector<PyObject*> parameters(length);
  for (Py_ssize_t i = 0; i < length; ++i) parameters[i] = PyTuple_GetItem(parameters_, i);
  held_.reserve(length);
  written_.reserve(length);
  addresses_.reserve(length);
  for (Py_ssize_t first = 0; first < length; first += kBlock) {
    const Py_ssize_t end = std::min(first + kBlock, length);
    if (!hold(parameters, first, end)) return false;
    for (Py_ssize_t i = first; i < end; ++i) {
      PyObject* const gradient = held_[i];
      if (reader.at_end()) return false;
      const int32_t kind = reader.kind();
      if (kind == kIgnored || kind == kAbsent) {
        if (kind == kAbsent && gradient != Py_None) return false;
        reader.skip();
        continue;
      }
      dlpack::Tensor tensor;
      bool is_parameter;
      if (!describe(gradient, &tensor, &is_parameter) || !reader.matches(tensor, is_parameter)) return false;
      written_.push_back(gradient);
      addresses_.push_back(address_of(tensor));
    }
  }
  return reader.at_end();
}

// A block's gradients, whose memory is on its way when they are looked at, while the next block's parameters are fetched.
bool GradientLook::hold(const std::vector<PyObject*>& parameters, Py_ssize_t first, Py_ssize_t end) {
  const Py_ssize_t length = static_cast<Py_ssize_t>(parameters.size());
  for (Py_ssize_t i = first; i < end; ++i) {
    if (i + 2 * kBlock < length) __builtin_prefetch(parameters[i + 2 * kBlock]);
    if (i + kBlock < length) fetch_tensor(parameters[i + kBlock]);
    PyObject* const gradient = gradient_of(parameters[i]);
    if (gradient == nullptr) return false;
    held_.push_back(gradient);
    fetch_tensor(gradient);
  }
  return true;
}

PyObject* GradientLook::kept() const {
  if (!stayed_) return bytes_of(addresses_);
  Py_INCREF(last_);
  return last_;
}

ClipTensors::ClipTensors(Arguments& arguments) : described(true), caps_stride(0) {
  dlpack::Tensor tensor = {};
  const auto next = [&](bool or_none = false) -> void* {
    PyObject* const object = arguments.object();
    bool is_parameter;
    if (object == nullptr || (or_none && object == Py_None)) return nullptr;
    if (describe(object, &tensor, &is_parameter)) return address_of(tensor);
    described = false;
    return nullptr;
  };
  caps = static_cast<const double*>(next());
  if (caps != nullptr && tensor.dims > 0) caps_stride = tensor.strides[0];
  inverse = static_cast<const double*>(next(true));
  found_inf = next(true);
  norms = next();
  coefs = next();
}

}  // namespace cwclip
