#include "signature.h"

#include <string>

namespace cwclip {
namespace {

DType dtype_of(const Head& head, size_t index) {
  if (head.kind == dlpack::kFloat && head.bits == 32) return DType::f32;
  if (head.kind == dlpack::kFloat && head.bits == 16) return DType::f16;
  if (head.kind == dlpack::kFloat && head.bits == 64) return DType::f64;
  if (head.kind == dlpack::kBfloat && head.bits == 16) return DType::bf16;
  throw std::runtime_error("grads[" + std::to_string(index) +
                           "]: expected float32, bfloat16, float16 or float64 elements");
}

}  // namespace

GradientShapes gradients_of(Bytes signature) {
  SignatureReader reader(signature);
  GradientShapes gradients;
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

BucketPieces read_bucket(Arguments& arguments) {
  const Bytes signature = arguments.bytes(), components = arguments.bytes(), cuts = arguments.bytes(true);
  const int64_t count = arguments.number();
  const bool wide = arguments.flag();
  if (arguments.failed()) return {};
  if (count < 0 || count > INT32_MAX) throw std::runtime_error("count: expected a number from 0 to 2^31 - 1");
  GradientShapes gradients = gradients_of(signature);
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

}  // namespace cwclip
