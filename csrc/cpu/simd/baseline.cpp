// The kernels for whatever the compiler targets by default: any x86-64, any other processor.
#define CWCLIP_ISA baseline
#define CWCLIP_VECTOR_BYTES 16
#include "kernels_isa.h"
