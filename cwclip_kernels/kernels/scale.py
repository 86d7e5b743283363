# mypy: ignore-errors
"""g <- factor * g in place, with given factors."""

import triton
import triton.language as tl

from .tile import VECTOR_BYTES, body_lanes, edge_lanes, gapped_lanes, locate, narrow, widen


@triton.jit
def scale_kernel(
    pointers,
    tiles,
    layouts,
    factors,
    DTYPES: tl.constexpr,
    DIMS: tl.constexpr,
    ZERO_FILL: tl.constexpr,
    ROWS: tl.constexpr,
    THREADS: tl.constexpr,
):
    """``g <- factor * g`` over one tile; with ZERO_FILL, g <- 0 where the factor is 0, so that inf and NaN vanish.

    Program: one tile, ROWS vectors a thread at a time. Bytes: none of the gradient where the factor is 1,
    otherwise each element read once and written once. Deterministic: elementwise.

    Args, beside ``tile``'s:
        factors: float32 or float64 [K].
    """
    row = tiles + tl.program_id(0).to(tl.int64) * 6
    scale_any(pointers, row, layouts, tl.load(factors + tl.load(row + 3)), DTYPES, DIMS, ZERO_FILL, ROWS, THREADS)


@triton.jit
def scale_any(
    pointers,
    row,
    layouts,
    factor,
    DTYPES: tl.constexpr,
    DIMS: tl.constexpr,
    ZERO_FILL: tl.constexpr,
    ROWS: tl.constexpr,
    THREADS: tl.constexpr,
):
    """The same over the tile of one table row, of any of these types."""
    if factor != 1.0:
        if len(DTYPES) == 1:
            scale_tile(pointers, row, layouts, factor, DTYPES[0], DIMS, ZERO_FILL, ROWS, THREADS)
        else:
            kind = tl.load(row + 5)
            for i in tl.static_range(len(DTYPES)):
                if kind == i:
                    scale_tile(pointers, row, layouts, factor, DTYPES[i], DIMS, ZERO_FILL, ROWS, THREADS)


@triton.jit
def scale_tile(
    pointers,
    row,
    layouts,
    factor,
    DTYPE: tl.constexpr,
    DIMS: tl.constexpr,
    ZERO_FILL: tl.constexpr,
    ROWS: tl.constexpr,
    THREADS: tl.constexpr,
):
    """The same over a tile of this type."""
    COLUMNS: tl.constexpr = THREADS * VECTOR_BYTES // (DTYPE.primitive_bitwidth // 8)
    if DIMS == 0:
        first, aligned, head, body, length = locate(pointers, row, DTYPE)
        edge, inside = edge_lanes(first, head, body, length)
        tl.store(edge, scaled(tl.load(edge, mask=inside, other=0.0), factor, ZERO_FILL), mask=inside)
        block, offsets = body_lanes(aligned, ROWS, COLUMNS)
        # Whole blocks go without masks: these would use up the predicates, and loads would wait for stores.
        whole = body // (ROWS * COLUMNS) * (ROWS * COLUMNS)
        for at in range(0, whole, ROWS * COLUMNS):
            tl.store(block + at, scaled(tl.load(block + at), factor, ZERO_FILL))
        if whole < body:
            mask = whole + offsets < body
            values = tl.load(block + whole, mask=mask, other=0.0)
            tl.store(block + whole, scaled(values, factor, ZERO_FILL), mask=mask)
    else:
        for at in range(0, tl.load(row + 2), COLUMNS):
            element, mask = gapped_lanes(pointers, row, layouts, at, DTYPE, DIMS, COLUMNS)
            values = tl.load(element, mask=mask, other=0.0)
            tl.store(element, scaled(values, factor, ZERO_FILL), mask=mask)


@triton.jit
def scaled(values, factor, ZERO_FILL: tl.constexpr):
    """``factor * x``, half precisions by way of float32; with ZERO_FILL, +0 if the factor is 0."""
    WIDE: tl.constexpr = tl.float64 if values.dtype.is_fp64() else tl.float32
    product = widen(values, WIDE) * factor.to(WIDE)
    if ZERO_FILL:
        product = tl.where(factor == 0.0, 0.0, product)
    return narrow(product, values.dtype)
