#include "torch_objects.h"

#include "tensor_calls.h"

namespace cwclip {
namespace {

PyObject *torch = nullptr, *requires_grad_of_any = nullptr, *increment_version = nullptr;
const dlpack::ExchangeApi* api = nullptr;

// Tensor.grad's descriptor, and how to ask it: without the look through the class and its bases.
PyObject* grad = nullptr;
descrgetfunc get_descriptor = nullptr;

TensorCalls calls = {};
Finding found = Finding::unknown;

bool find_grad() {
  PyObject* const base = PyObject_GetAttrString(tensor_type, "__base__");
  grad = base == nullptr ? nullptr : PyObject_GetAttrString(base, "grad");
  Py_XDECREF(base);
  if (grad == nullptr) return false;
  get_descriptor = reinterpret_cast<descrgetfunc>(PyType_GetSlot(Py_TYPE(grad), Py_tp_descr_get));
  if (get_descriptor == nullptr) PyErr_SetString(PyExc_ImportError, "this torch's Tensor.grad is not a descriptor");
  return get_descriptor != nullptr;
}

bool find_api() {
  PyObject* const capsule = PyObject_GetAttrString(tensor_type, "__dlpack_c_exchange_api__");
  if (capsule == nullptr) return false;
  api = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule, dlpack::kCapsule));
  Py_DECREF(capsule);  // torch's own class keeps it
  while (api != nullptr && api->major > dlpack::kMajorVersion) api = api->older;
  if (api != nullptr && api->from_python != nullptr && api->current_stream != nullptr) return true;
  if (!PyErr_Occurred()) PyErr_SetString(PyExc_ImportError, "this torch's DLPack is not one that cwclip_kernels knows");
  return false;
}

PyObject* tuple_of(const std::vector<PyObject*>& tensors) {
  PyObject* const tuple = PyTuple_New(static_cast<Py_ssize_t>(tensors.size()));
  for (size_t i = 0; tuple != nullptr && i < tensors.size(); ++i) {
    Py_INCREF(tensors[i]);
    PyTuple_SetItem(tuple, static_cast<Py_ssize_t>(i), tensors[i]);
  }
  return tuple;
}

}  // namespace

bool find_torch() {
  torch = PyImport_ImportModule("torch");
  if (torch == nullptr) return false;
  tensor_type = PyObject_GetAttrString(torch, "Tensor");
  PyObject* const nn = PyObject_GetAttrString(torch, "nn");
  if (nn != nullptr) parameter_type = PyObject_GetAttrString(nn, "Parameter");
  Py_XDECREF(nn);
  PyObject* const native = PyObject_GetAttrString(torch, "_C");
  if (native != nullptr) requires_grad_of_any = PyObject_GetAttrString(native, "_any_requires_grad");
  if (requires_grad_of_any != nullptr) increment_version = PyObject_GetAttrString(native, "_increment_version");
  Py_XDECREF(native);
  return tensor_type != nullptr && parameter_type != nullptr && increment_version != nullptr && find_grad() && find_api();
}

bool describe(PyObject* entry, dlpack::Tensor* tensor, bool* is_parameter) {
  *is_parameter = reinterpret_cast<PyObject*>(Py_TYPE(entry)) == parameter_type;
  if (is_plain(entry) && api->from_python(entry, tensor) == 0) return true;
  PyErr_Clear();
  return false;
}

bool calls_torch_directly() {
  if (found == Finding::unknown) {
    found = calls.find(torch);
    if (found == Finding::right) word_of_tensor = calls.word;
  }
  return found == Finding::right;
}

void call_torch_through_python(bool always) { found = always ? Finding::absent : Finding::unknown; }

PyObject* gradient_of(PyObject* tensor) {
  if (!is_plain(tensor)) return PyObject_GetAttrString(tensor, "grad");
  if (!calls_torch_directly()) return get_descriptor(grad, tensor, reinterpret_cast<PyObject*>(Py_TYPE(tensor)));
  try {
    return calls.wrap(calls.grad(*calls.tensor_of(tensor)));
  } catch (const std::exception& error) {
    return raise(PyExc_RuntimeError, error.what());
  }
}

int any_requires_grad(const std::vector<PyObject*>& tensors) {
  if (calls_torch_directly()) {
    for (PyObject* const tensor : tensors) {
      if (calls.requires_grad(*calls.tensor_of(tensor))) return 1;
    }
    return 0;
  }
  PyObject* const tuple = tuple_of(tensors);
  PyObject* const answer = tuple == nullptr ? nullptr : PyObject_CallObject(requires_grad_of_any, tuple);
  const int any = answer == nullptr ? -1 : PyObject_IsTrue(answer);
  Py_XDECREF(answer);
  Py_XDECREF(tuple);
  return any;
}

bool bump_versions(const std::vector<PyObject*>& tensors) {
  if (calls_torch_directly()) {
    for (PyObject* const tensor : tensors) {
      try {
        calls.bump_version(calls.tensor_of(tensor));
      } catch (const std::exception&) {
        // A tensor made in inference mode, which has no version: torch's Python function passes over it as well.
      }
    }
    return true;
  }
  PyObject* const tuple = tuple_of(tensors);
  PyObject* const done = tuple == nullptr ? nullptr : PyObject_CallFunctionObjArgs(increment_version, tuple, nullptr);
  Py_XDECREF(done);
  Py_XDECREF(tuple);
  return done != nullptr;
}

const dlpack::ExchangeApi& exchange_api() { return *api; }

}  // namespace cwclip
