#include "tensor_calls.h"

#include "torch_objects.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstring>
#include <iterator>

namespace cwclip {
namespace {

// A reference of our own, which may be null.
class Owned {
 public:
  explicit Owned(PyObject* object) : object_(object) {}
  Owned(const Owned&) = delete;
  ~Owned() { Py_XDECREF(object_); }
  operator PyObject*() const { return object_; }

 private:
  PyObject* object_;
};

// A function of a library that torch has loaded. Not by dlsym's default: torch's libraries aren't in the global scope.
template <class Function>
bool look_up(const char* library, const char* name, Function* function) {
  void* const handle = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
  void* const found = handle == nullptr ? nullptr : dlsym(handle, name);
  *function = reinterpret_cast<Function>(found);
  return found != nullptr;
}

constexpr unsigned long long kNone = ~0ull;

// A tensor's attribute as a number; `otherwise` if it has none.
unsigned long long number_of(PyObject* object, const char* name, unsigned long long otherwise) {
  const Owned value(PyObject_GetAttrString(object, name));
  const unsigned long long number = value == nullptr ? otherwise : PyLong_AsUnsignedLongLong(value);
  return PyErr_Occurred() ? otherwise : number;
}

// torch.zeros(1, device="cpu")
PyObject* zero(PyObject* torch) {
  const Owned function(PyObject_GetAttrString(torch, "zeros")), arguments(Py_BuildValue("(i)", 1));
  const Owned options(Py_BuildValue("{s:s}", "device", "cpu"));
  if (function == nullptr || arguments == nullptr || options == nullptr) return nullptr;
  return PyObject_Call(function, arguments, options);
}

// The versions of torch that the suite has run on with these functions. A name may outlive what it returns.
constexpr const char* kTried[] = {"2.11.", "2.13."};

bool is_tried(PyObject* torch) {
  const Owned version(PyObject_GetAttrString(torch, "__version__")), encoded(
      version == nullptr ? nullptr : PyUnicode_AsUTF8String(version));
  const char* const text = encoded == nullptr ? nullptr : PyBytes_AsString(encoded);
  if (text == nullptr) PyErr_Clear();
  return text != nullptr && std::any_of(std::begin(kTried), std::end(kTried), [&](const char* tried) {
           return std::strncmp(text, tried, std::strlen(tried)) == 0;
         });
}

TensorCalls::Impl impl_of(PyObject* tensor) {
  return reinterpret_cast<TensorCalls::Impl>(static_cast<uintptr_t>(number_of(tensor, "_cdata", 0)));
}

// Whether the word is the one where both objects keep their tensors.
bool is_kept_at(int word, PyObject* one, PyObject* other) {
  for (PyObject* const object : {one, other}) {
    const Owned type(PyObject_Type(object));
    if (type == nullptr || number_of(type, "__basicsize__", 0) < (word + 1) * sizeof(void*)) return false;
    const TensorCalls::Impl impl = impl_of(object);
    if (impl == nullptr || reinterpret_cast<TensorCalls::Impl*>(object)[word] != impl) return false;
  }
  return true;
}

bool are_right(TensorCalls& calls, PyObject* parameter, PyObject* gradient) {
  constexpr int kFirst = sizeof(PyObject) / sizeof(void*);
  for (calls.word = kFirst; !is_kept_at(calls.word, parameter, gradient); ++calls.word) {
    if (calls.word > kFirst) return false;
  }
  const TensorCalls::Impl of_parameter = impl_of(parameter), of_gradient = impl_of(gradient);
  const TensorCalls::Tensor found = calls.grad(of_parameter), none = calls.grad(of_gradient);
  if (found == nullptr || none == nullptr || *found != of_gradient || *none == nullptr) return false;
  const Owned wrapped(calls.wrap(found)), nothing(calls.wrap(none));
  if (wrapped != gradient || nothing != Py_None) return false;
  if (!calls.requires_grad(of_parameter) || calls.requires_grad(of_gradient)) return false;
  const unsigned long long version = number_of(gradient, "_version", 0);
  calls.bump_version(calls.tensor_of(gradient));
  return number_of(gradient, "_version", 0) == version + 1;
}

}  // namespace

Finding TensorCalls::find(PyObject* torch) {
  if (!is_tried(torch) ||
      !look_up("libc10.so", "_ZNK3c1010TensorImpl4gradEv", &grad) ||
      !look_up("libc10.so", "_ZNK3c1010TensorImpl13requires_gradEv", &requires_grad) ||
      !look_up("libtorch_python.so", "_Z16THPVariable_WrapRKN2at10TensorBaseE", &wrap) ||
      !look_up("libtorch_cpu.so", "_ZN5torch8autograd4impl12bump_versionERKN2at6TensorE", &bump_version)) {
    return Finding::absent;
  }
  const Owned nn(PyObject_GetAttrString(torch, "nn")), data(zero(torch)), gradient(zero(torch));
  const Owned parameter(nn == nullptr || data == nullptr ? nullptr : PyObject_CallMethod(nn, "Parameter", "O", +data));
  const bool tells = parameter != nullptr && gradient != nullptr && is_plain(parameter) && is_plain(gradient) &&
                     number_of(gradient, "_version", kNone) != kNone &&
                     PyObject_SetAttrString(parameter, "grad", gradient) == 0;
  bool right = false;
  try {
    right = tells && are_right(*this, parameter, gradient);
  } catch (...) {
  }
  PyErr_Clear();
  return right ? Finding::right : tells ? Finding::absent : Finding::unknown;
}

}  // namespace cwclip
