// The CPU's functions of the Python module. They let go of the GIL while they work, and raise before the first byte is
// written.
#pragma once

#include "../common/python.h"

namespace cwclip::cpu {

// cpu_program, cpu_power_sums, cpu_scale, cpu_clip; ends with a null entry.
extern PyMethodDef methods[];

}  // namespace cwclip::cpu
