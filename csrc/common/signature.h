// What a list of tensors looks like, as bytes: dtypes, devices, shapes and strides, to be compared at every call.
#pragma once

#include "dlpack.h"
#include "pieces.h"
#include "python.h"

#include <cstring>
#include <stdexcept>

namespace cwclip {

// A signature has, for each entry of a list, one Head and then its sizes and its strides.
struct Head {
  int32_t kind, bits, device_type, device, dims, is_parameter;
};
static_assert(sizeof(Head) % sizeof(int64_t) == 0, "sizes and strides stay aligned");

// Kinds of entries without a gradient: None, and Ellipsis, where anything may be.
constexpr int32_t kAbsent = -1, kIgnored = -2;

inline Head head_of(const dlpack::Tensor& tensor, bool is_parameter) {
  return {tensor.element.kind, tensor.element.bits, tensor.device.type, tensor.device.index, tensor.dims, is_parameter};
}

// Reads a signature one entry after another.
class SignatureReader {
 public:
  explicit SignatureReader(Bytes bytes) : at_(bytes.data), end_(bytes.data + bytes.size) {}

  bool at_end() const { return at_ == end_; }

  // The next entry; throws std::runtime_error if it is cut short.
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
    const size_t bytes = sizeof head + 2 * tensor.dims * sizeof(int64_t);
    if (static_cast<size_t>(end_ - at_) < bytes || std::memcmp(at_, &head, sizeof head) != 0) return false;
    const char* planned = at_ + sizeof head;
    bool same = true;
    for (const int64_t* const numbers : {tensor.sizes, tensor.strides}) {
      for (int32_t d = 0; d < tensor.dims; ++d, planned += sizeof(int64_t)) {  // too few for a call of memcmp
        same &= std::memcmp(planned, numbers + d, sizeof(int64_t)) == 0;
      }
    }
    if (same) at_ = planned;
    return same;
  }

 private:
  const char *at_, *end_;
};

struct GradientShapes {
  std::vector<Piece> pieces;  // without data and components
  std::vector<Shape> shapes;  // in the signature's own memory, which has to be aligned as Python's bytes are
};

// The gradients that a signature describes. Throws std::runtime_error for what kernels don't serve.
GradientShapes gradients_of(Bytes signature);

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

}  // namespace cwclip
