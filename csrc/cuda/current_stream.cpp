#include "current_stream.h"

#include "../common/torch_objects.h"

namespace cwclip::cuda {

bool find_current_stream(int32_t device, void** stream) {
  return exchange_api().current_stream(dlpack::kCuda, device, stream) == 0;
}

}  // namespace cwclip::cuda
