// What Python calls of the CPU kernels, without torch's dispatcher: see cwclip_kernels/backends/cpu.py. All of them let go
// of the GIL while they work, and raise RuntimeError before the first byte is written.
#pragma once

#include <Python.h>

namespace cwclip::cpu {

// cpu_program(layout: bytes, components: bytes, cuts: bytes | None, count: int) -> capsule. All that a call needs beside
// addresses: pieces of gradients and the tiles that they are taken in.
PyObject* py_program(PyObject* module, PyObject* arguments);

// cpu_power_sums(program, addresses: bytes, norm_type: float, sums: int) -> None. float64 [count] at `sums`.
PyObject* py_power_sums(PyObject* module, PyObject* const* arguments, Py_ssize_t count);

// cpu_scale(program, addresses: bytes, factors: int, zero_fill: bool) -> None. g <- factor * g; float64 [count].
PyObject* py_scale(PyObject* module, PyObject* const* arguments, Py_ssize_t count);

// cpu_clip(program, addresses: bytes, norm_type: float, eps: float, nonfinite: int, wide: bool, caps: int,
//          caps_stride: int, inverse: int, found_inf: int, norms: int, coefs: int) -> None.
// Addresses of caps float64 [] (stride 0) or [count], inverse float64 [] and found_inf float32 [] (0 for none); norms and
// coefs [count] are float64 if `wide`, else float32.
PyObject* py_clip(PyObject* module, PyObject* const* arguments, Py_ssize_t count);

}  // namespace cwclip::cpu
