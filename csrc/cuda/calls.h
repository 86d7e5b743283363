// What cwclip_kernels/backends/cuda.py calls. Memory on the device comes as addresses; nothing here waits for the device.
// `device` has to be torch's current one.
#pragma once

#include <Python.h>

namespace cwclip::cuda {

// cuda_program(layout: bytes, components: bytes, count) -> (tables: bytes, program: bytes, workspace_bytes).
// components: int64 for each gradient; count: K. The tables have to be brought to the device.
PyObject* py_program(PyObject* module, PyObject* arguments);

// cuda_enqueue(kind, norm_type, program, addresses, tables, workspace, sums, norms, coefs, caps, caps_stride, eps,
// nonfinite, wide, device, stream). kind: 0 power sums, 1 scale by given coefs, 2 clip.
PyObject* py_enqueue(PyObject* module, PyObject* arguments);

// cuda_stream(device) -> (stream, whether it is being captured), torch's current one.
PyObject* py_stream(PyObject* module, PyObject* device);

// cuda_obstacle(device) -> why the kernels can't run there, or None.
PyObject* py_obstacle(PyObject* module, PyObject* device);

}  // namespace cwclip::cuda
