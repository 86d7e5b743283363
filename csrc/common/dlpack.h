// The part of DLPack's C interface that we use, version 1.x (https://dmlc.github.io/dlpack): its layout in memory is the
// standard's. Declared here because torch's copy can't be included next to its stable ABI.
#pragma once

#include "python.h"

#include <cstdint>

namespace cwclip::dlpack {

constexpr uint32_t kMajorVersion = 1;

enum DeviceType : int32_t { kCpu = 1, kCuda = 2 };
enum ElementKind : uint8_t { kFloat = 2, kBfloat = 4 };

struct Device {
  int32_t type, index;
};

struct ElementType {
  uint8_t kind, bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t dims;
  ElementType element;
  const int64_t *sizes, *strides;  // strides in elements
  uint64_t byte_offset;
};

// What a tensor class offers to C under __dlpack_c_exchange_api__, a capsule of name kCapsule.
constexpr const char* kCapsule = "dlpack_exchange_api";

struct ExchangeApi {
  uint32_t major, minor;
  const ExchangeApi* older;  // the same for an older major version, or null
  void *allocate, *managed_from_python, *managed_to_python;  // not used here
  // No reference is taken and no stream waited for; 0, or an error is set. May be null.
  int (*from_python)(PyObject* tensor, Tensor* result);
  int (*current_stream)(DeviceType type, int32_t device, void** stream);
};

}  // namespace cwclip::dlpack
