// Torch's current stream. Apart, so that the suite's stand-in for a GPU can have one of its own.
#pragma once

#include <cstdint>

namespace cwclip::cuda {

// The handle of the stream that torch uses on a device now. False with a Python error set if that can't be told.
bool find_current_stream(int32_t device, void** stream);

}  // namespace cwclip::cuda
