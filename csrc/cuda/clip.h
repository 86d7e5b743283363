// The GPU's functions of the Python module. Memory on the device comes as addresses; nothing here waits for the device,
// which has to be torch's current one.
#pragma once

#include "../common/python.h"

namespace cwclip::cuda {

// cuda_program, cuda_place, cuda_power_sums, cuda_scale, cuda_clip, cuda_stream, cuda_obstacle; ends with a null entry.
extern PyMethodDef methods[];

}  // namespace cwclip::cuda
