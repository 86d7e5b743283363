# mypy: ignore-errors
"""The first pass of clipping: partial power sums, and all of it for components that are one tile."""

import triton
import triton.language as tl

from .coefficients import judge
from .power_sums import sum_of_any
from .scale import scale_any


@triton.jit(do_not_specialize=["several"])
def sum_or_clip_kernel(
    pointers,
    tiles,
    layouts,
    several,
    partials,
    caps,
    cap_stride,
    inverse,
    norms,
    coefs,
    found_inf,
    DTYPES: tl.constexpr,
    DIMS: tl.constexpr,
    ORDER: tl.constexpr,
    EPS: tl.constexpr,
    NONFINITE: tl.constexpr,
    ROWS: tl.constexpr,
    THREADS: tl.constexpr,
):
    """``partials[slot]`` = sum |g|^p over one tile; if it is its component's only one, g <- coef * g instead.

    Program: one tile, ``power_sums_kernel``'s, and for the only tile of a component ``coefficients_kernel``'s and
    ``scale_kernel``'s after it. Bytes: each element once; one that is clipped is loaded again, from L1 or L2, since
    such a tile has at most 64 KB, and written. Both kinds are in one launch, so that sets of small components, LoRA's
    factors, take no other, and biases beside large matrices none of their own. On sm_90 float32 and bfloat16 need 64
    and 69 registers, ``power_sums_kernel`` 60 and 64. Deterministic: fixed order.

    Args, beside those of these three:
        several: tiles from this one on are the only ones of their components.
    """
    tile = tl.program_id(0)
    row = tiles + tile.to(tl.int64) * 7
    total = sum_of_any(pointers, row, layouts, DTYPES, DIMS, ORDER, ROWS, THREADS)
    if tile < several:
        tl.store(partials + tl.load(row + 6), total)
    else:
        component = tl.load(row + 3)
        # fmt: off
        factor = judge(component, total, caps, cap_stride, inverse, norms, coefs, found_inf, ORDER, EPS, NONFINITE)
        scale_any(pointers, row, layouts, factor, DTYPES, DIMS, NONFINITE == "zero", ROWS, THREADS)
        # fmt: on
