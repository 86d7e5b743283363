"""Triton kernels that show what device functions return. Importing this imports Triton."""

import triton
import triton.language as tl

from cwclip_kernels.kernels.adamw import common_body


@triton.jit
def common_body_kernel(at, found, GRAD: tl.constexpr, PARAM: tl.constexpr, STATE: tl.constexpr):
    """``found[:2]`` = ``common_body`` of 100 elements at the addresses ``at[:5]``."""
    g, p, m, v, w = tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4)
    head, body = common_body(g, p, m, v, w, 100, GRAD, PARAM, STATE)
    tl.store(found, head)
    tl.store(found + 1, body)
