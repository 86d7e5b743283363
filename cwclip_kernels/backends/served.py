"""What can be clipped, and what the compiled kernels serve of it: one table for checks, native code and Triton."""

from __future__ import annotations

import math

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
COMPLEX_DTYPES = (torch.complex64, torch.complex128)
ORDERS = (1.0, 2.0, math.inf)  # of the norm, in compiled kernels; torch's operators serve all of them


def unserved(dtype: torch.dtype, norm_type: float) -> str | None:
    """Why there is no compiled kernel for such a gradient, or None."""
    if norm_type not in ORDERS:
        return f"serves norm_type 1, 2 and inf, not {norm_type:g}"
    if dtype in COMPLEX_DTYPES:
        return None if norm_type == 2.0 else "serves complex gradients for norm_type 2 only"
    return None if dtype in DTYPES else f"does not serve {dtype}"
