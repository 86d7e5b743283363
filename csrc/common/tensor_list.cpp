#include "tensor_list.h"

#include "dlpack.h"
#include "pieces.h"

#include <cstring>
#include <stdexcept>
#include <string>

namespace cwclip {
namespace {

PyObject *tensor_type = nullptr, *parameter_type = nullptr;
const dlpack::ExchangeApi* api = nullptr;

// A signature has, for each entry of a list, one Head and then its sizes and its strides.
struct Head {
  int32_t kind, bits, device_type, device, dims, is_parameter;
};
static_assert(sizeof(Head) % sizeof(int64_t) == 0, "sizes and strides stay aligned");

// Kinds of entries without a gradient: None, and Ellipsis, where anything may be.
constexpr int32_t kAbsent = -1, kIgnored = -2;

Head head_of(const dlpack::Tensor& tensor, bool is_parameter) {
  return {tensor.element.kind, tensor.element.bits, tensor.device.type, tensor.device.index, tensor.dims, is_parameter};
}

DType dtype_of(const Head& head, size_t index) {
  if (head.kind == dlpack::kFloat && head.bits == 32) return DType::f32;
  if (head.kind == dlpack::kFloat && head.bits == 16) return DType::f16;
  if (head.kind == dlpack::kFloat && head.bits == 64) return DType::f64;
  if (head.kind == dlpack::kBfloat && head.bits == 16) return DType::bf16;
  throw std::runtime_error("grads[" + std::to_string(index) +
                           "]: expected float32, bfloat16, float16 or float64 elements");
}

void* address_of(const dlpack::Tensor& tensor) { return static_cast<char*>(tensor.data) + tensor.byte_offset; }

// Reads a signature one entry after another.
class SignatureReader {
 public:
  explicit SignatureReader(Bytes bytes) : at_(bytes.data), end_(bytes.data + bytes.size) {}

  bool at_end() const { return at_ == end_; }

  // The next entry; throws if it is cut short.
  Head next(const int64_t** sizes, const int64_t** strides) {
    Head head;
    if (end_ - at_ < static_cast<ptrdiff_t>(sizeof head)) throw std::runtime_error("signature: too short");
    std::memcpy(&head, at_, sizeof head);
    const ptrdiff_t bytes = head.dims * static_cast<ptrdiff_t>(sizeof(int64_t));
    if (head.dims < 0 || end_ - at_ - static_cast<ptrdiff_t>(sizeof head) < 2 * bytes) {
      throw std::runtime_error("signature: too short");
    }
    *sizes = reinterpret_cast<const int64_t*>(at_ + sizeof head);
    *strides = *sizes + head.dims;
    at_ += sizeof head + 2 * bytes;
    return head;
  }

  // The kind of the next entry. Of one cut short a gradient's: next() and matches() then notice that it is too short.
  int32_t kind() const {
    Head head = {dlpack::kFloat, 0, 0, 0, 0, 0};
    if (end_ - at_ >= static_cast<ptrdiff_t>(sizeof head)) std::memcpy(&head, at_, sizeof head);
    return head.kind;
  }

  // Moves past an entry without a gradient.
  void skip() { at_ += sizeof(Head); }

  // Whether the next gradient is like this one; moves past it if so.
  bool matches(const dlpack::Tensor& tensor, bool is_parameter) {
    const Head head = head_of(tensor, is_parameter);
    const size_t bytes = tensor.dims * sizeof(int64_t);
    if (static_cast<size_t>(end_ - at_) < sizeof head + 2 * bytes || std::memcmp(at_, &head, sizeof head) != 0) {
      return false;
    }
    const char* const sizes = at_ + sizeof head;
    if (bytes != 0 && (std::memcmp(sizes, tensor.sizes, bytes) != 0 ||
                       std::memcmp(sizes + bytes, tensor.strides, bytes) != 0)) {
      return false;
    }
    at_ = sizes + 2 * bytes;
    return true;
  }

 private:
  const char *at_, *end_;
};

// False for anything but a Tensor or a Parameter, and for what torch can't describe.
bool describe(PyObject* entry, dlpack::Tensor* tensor, bool* is_parameter) {
  PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(entry));
  *is_parameter = type == parameter_type;
  if ((type == tensor_type || *is_parameter) && api->from_python(entry, tensor) == 0) return true;
  PyErr_Clear();
  return false;
}

// Asks for the memory of entries further on: a list's tensors lie anywhere, and after a backward pass none is in cache.
// Hints alone: where a tensor's object keeps the address of the tensor is torch's own affair, and if it isn't one of
// the two words after the object's head, nothing is gained and nothing goes wrong.
void fetch_ahead(PyObject* list, Py_ssize_t i, Py_ssize_t length) {
  constexpr Py_ssize_t kObject = 16, kTensor = 8;
  if (i + kObject < length) __builtin_prefetch(PyList_GetItem(list, i + kObject));
  if (i + kTensor >= length) return;
  PyObject* const entry = PyList_GetItem(list, i + kTensor);
  PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(entry));
  if (type != tensor_type && type != parameter_type) return;
  const char* const* const words = reinterpret_cast<const char* const*>(entry) + sizeof(PyObject) / sizeof(void*);
  for (int word = 0; word < 2; ++word) {
    for (int line = 0; line < 4; ++line) __builtin_prefetch(words[word] + 64 * line);
  }
}

template <class T>
void append(std::string& bytes, const T* values, size_t count) {
  if (count != 0) bytes.append(reinterpret_cast<const char*>(values), count * sizeof(T));
}

struct Gradients {
  std::vector<Piece> pieces;  // without data and components
  std::vector<Shape> shapes;  // in the signature's own memory, which has to be aligned as Python's bytes are
};

// The gradients that a signature describes.
Gradients gradients_of(Bytes signature) {
  SignatureReader reader(signature);
  Gradients gradients;
  for (size_t i = 0; !reader.at_end(); ++i) {
    const int64_t *sizes, *strides;
    const Head head = reader.next(&sizes, &strides);
    if (head.kind < 0) continue;
    int64_t numel = 1;
    for (int32_t d = 0; d < head.dims; ++d) numel *= sizes[d];
    gradients.pieces.push_back({nullptr, numel, dtype_of(head, i), 0, strides_of(sizes, strides, head.dims, i)});
    gradients.shapes.push_back({sizes, strides, head.dims});
  }
  return gradients;
}

}  // namespace

bool find_torch() {
  PyObject* const torch = PyImport_ImportModule("torch");
  if (torch == nullptr) return false;
  tensor_type = PyObject_GetAttrString(torch, "Tensor");
  PyObject* const nn = PyObject_GetAttrString(torch, "nn");
  Py_DECREF(torch);
  if (nn != nullptr) parameter_type = PyObject_GetAttrString(nn, "Parameter");
  Py_XDECREF(nn);
  if (tensor_type == nullptr || parameter_type == nullptr) return false;
  PyObject* const capsule = PyObject_GetAttrString(tensor_type, "__dlpack_c_exchange_api__");
  if (capsule == nullptr) return false;
  api = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule, dlpack::kCapsule));
  Py_DECREF(capsule);  // torch's own class keeps it
  while (api != nullptr && api->major > dlpack::kMajorVersion) api = api->older;
  if (api != nullptr && api->from_python != nullptr && api->current_stream != nullptr) return true;
  if (!PyErr_Occurred()) PyErr_SetString(PyExc_ImportError, "this torch's DLPack is not one that cwclip_kernels knows");
  return false;
}

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
  const Bytes last = arguments.bytes(true);
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
  const Py_ssize_t bytes = static_cast<Py_ssize_t>(addresses.size() * sizeof(void*));
  if (last.data != nullptr && last.size == bytes && (bytes == 0 || std::memcmp(last.data, addresses.data(), bytes) == 0)) {
    Py_INCREF(values[2]);
    return values[2];
  }
  if (writes) {
    try {
      std::vector<Piece> pieces = gradients_of(signature).pieces;
      for (size_t i = 0; i < pieces.size(); ++i) pieces[i].data = addresses[i];
      if (share_memory(pieces)) Py_RETURN_NONE;
    } catch (const std::exception&) {
      Py_RETURN_NONE;
    }
  }
  return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(addresses.data()), bytes);
}

BucketPieces read_bucket(Arguments& arguments) {
  const Bytes signature = arguments.bytes(), components = arguments.bytes(), cuts = arguments.bytes(true);
  const int64_t count = arguments.number();
  const bool wide = arguments.flag();
  if (arguments.failed()) return {};
  if (count < 0 || count > INT32_MAX) throw std::runtime_error("count: expected a number from 0 to 2^31 - 1");
  Gradients gradients = gradients_of(signature);
  const size_t addresses = gradients.pieces.size();
  constexpr Py_ssize_t kNumber = sizeof(int64_t);
  const Cuts numbers = {components.as<int64_t>(), components.size / kNumber, cuts.as<int64_t>(), cuts.size / kNumber};
  return {cut(std::move(gradients.pieces), gradients.shapes, numbers, count), addresses, count, wide};
}

std::vector<Entry> entries_of(Bytes signature) {
  SignatureReader reader(signature);
  std::vector<Entry> entries;
  while (!reader.at_end()) {
    Entry entry = {};
    const Head head = reader.next(&entry.shape.sizes, &entry.shape.strides);
    entry.present = head.kind >= 0;
    if (entry.present) {
      entry.on_cpu = head.device_type == dlpack::kCpu;
      entry.dtype = dtype_of(head, entries.size());
      entry.shape.dims = head.dims;
    }
    entries.push_back(entry);
  }
  return entries;
}

bool find_cuda_stream(int32_t device, void** stream) {
  return api->current_stream(dlpack::kCuda, device, stream) == 0;
}

}  // namespace cwclip
