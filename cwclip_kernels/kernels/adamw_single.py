# mypy: ignore-errors
"""Norm, coefficient and AdamW's step in one pass: of components that are one tile."""

import triton
import triton.language as tl

from .adamw import step_tile
from .coefficients import judge
from .power_sums import tile_sum


@triton.jit(do_not_specialize=["count"])
def adamw_single_kernel(
    pointers,
    tiles,
    layouts,
    caps,
    cap_stride,
    inverse,
    norms,
    coefs,
    found_inf,
    states,
    count,
    scalars,
    skip,
    GRAD: tl.constexpr,
    PARAM: tl.constexpr,
    STATE: tl.constexpr,
    AMSGRAD: tl.constexpr,
    DIMS: tl.constexpr,
    ORDER: tl.constexpr,
    EPS: tl.constexpr,
    NONFINITE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
):
    """``norm = (sum |g|^p)^(1/p); coef = min(1, cap / (norm + eps)); m, v, p <- AdamW(coef * g)`` over one tile.

    Program: one component, which is one tile: first ``power_sums_kernel``'s program, ROWS vectors a thread at a
    time, then ``coefficients_kernel``'s and ``adamw_kernel``'s. Bytes: as ``adamw_kernel``, 28 for each float32
    element; g is loaded twice, the second time from L1 or L2, since a tile has at most 64 KB of it. Norm and
    coefficient, 8 bytes, are stored, no partial sum. Deterministic: the same bits as those three kernels.

    Where ``skip`` is not 0, the norm and the coefficient are all that is written. Args: those of ``adamw_kernel``,
    and of ``coefficients_kernel`` those from which it makes the factor.
    """
    row = tiles + tl.program_id(0).to(tl.int64) * 6
    component = tl.load(row + 3)
    total = tile_sum(pointers, row, layouts, GRAD, DIMS, ORDER, ROWS, LANES)
    # fmt: off
    factor = judge(component, total, caps, cap_stride, inverse, norms, coefs, found_inf, ORDER, EPS, NONFINITE)
    step_tile(pointers, row, layouts, factor, states, count, scalars, skip, GRAD, PARAM, STATE, AMSGRAD, DIMS,
              NONFINITE == "zero", COLUMNS, LANES)
    # fmt: on
