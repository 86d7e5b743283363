# mypy: ignore-errors
"""Partial power sums: the one pass over all gradients that every norm needs."""

import triton
import triton.language as tl

from .tile import INF, body_lanes, edge_lanes, gapped_lanes, larger, largest, locate, magnitude_bits, widen

# Float32 squares are trusted where the tile's largest |x| is in this range: 8 squares of at most 2^120 don't
# overflow, and what 2^17 squares lose by underflow (2^-126 each, if subnormals are flushed) is below 2^-28 of
# a sum of at least 2^-80. Outside, and there alone, the tile is read again in float64.
TRUSTED_FROM = tl.constexpr(2.0**-40)
TRUSTED_TO = tl.constexpr(2.0**60)


@triton.jit
def power_sums_kernel(
    pointers,
    tiles,
    layouts,
    partials,
    DTYPE: tl.constexpr,
    DIMS: tl.constexpr,
    ORDER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """``partials[slot]`` = sum |g|^p over one tile, max |g| for p = inf; NaN and inf come out as themselves.

    Program: one tile, [ROWS, COLUMNS] elements at a time. Bytes: each element once, and 8 written.
    Deterministic: fixed order, one writer for each slot. The order is that of the tile's 16-byte vectors, so
    equal gradients at addresses that differ modulo 16 may differ in the norm's last bits.

    Accuracy: float32 adds up ROWS terms and no more; columns, tiles and components add up in float64.

    Further columns of ``tiles``: slot among the ``partials`` (float64), layout. The rest is ``tile``'s.
    """
    row = tiles + tl.program_id(0).to(tl.int64) * 5
    if DIMS == 0:
        total = dense_sum(pointers, row, DTYPE, ORDER, ROWS, COLUMNS)
    else:
        total = gapped_sum(pointers, row, layouts + tl.load(row + 4), DTYPE, DIMS, ORDER, COLUMNS)
    tl.store(partials + tl.load(row + 3), total)


@triton.jit
def dense_sum(pointers, row, DTYPE: tl.constexpr, ORDER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The power sum of one tile without gaps."""
    first, aligned, head, body, length = locate(pointers, row, DTYPE)
    edge, mask = edge_lanes(first, head, body, length)
    edges = widen(tl.load(edge, mask=mask, other=0.0), tl.float64)
    if ORDER == INF:
        total = larger(body_max(aligned, body, ROWS, COLUMNS), largest(edges))
    else:
        WIDE: tl.constexpr = tl.float64 if DTYPE.is_fp64() else tl.float32
        total, peak = body_sum(aligned, body, ORDER, WIDE, ROWS, COLUMNS)
        # Squares of float16 always fit float32.
        if DTYPE.is_fp32() or DTYPE.is_bf16():  # noqa: SIM102  # one compile-time, one run-time
            if (peak > TRUSTED_TO) | ((peak > 0.0) & (peak < TRUSTED_FROM)):
                # One row at a time: a path hardly ever taken must not set the register count.
                total, _ = body_sum(aligned, body, ORDER, tl.float64, 1, COLUMNS)
        total += tl.sum(power(edges, ORDER), 0)
    return total


@triton.jit
def gapped_sum(
    pointers, row, layout, DTYPE: tl.constexpr, DIMS: tl.constexpr, ORDER: tl.constexpr, COLUMNS: tl.constexpr
):
    """The power sum of one tile with gaps, in float64 throughout."""
    sums = tl.zeros([COLUMNS], tl.float64)
    for at in range(0, tl.load(row + 2), COLUMNS):
        element, mask = gapped_lanes(pointers, row, layout, at, DTYPE, DIMS, COLUMNS)
        values = widen(tl.load(element, mask=mask, other=0.0), tl.float64)
        sums = larger(sums, values) if ORDER == INF else sums + power(values, ORDER)
    return largest(sums) if ORDER == INF else tl.sum(sums, 0)


@triton.jit
def power(values, ORDER: tl.constexpr):
    """|x|^p for p = 1 or 2."""
    return values * values if ORDER == 2.0 else tl.abs(values)


@triton.jit
def body_sum(aligned, body, ORDER: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sum |x|^p over a tile's body (float64; ROWS powers at a time added in WIDE), and max |x| (WIDE)."""
    block, offsets = body_lanes(aligned, ROWS, COLUMNS)
    sums = tl.zeros([COLUMNS], tl.float64)
    peaks = magnitude_bits(tl.zeros([COLUMNS], WIDE))
    for at in range(0, body, ROWS * COLUMNS):
        values = widen(tl.load(block + at, mask=at + offsets < body, other=0.0), WIDE)
        sums += tl.sum(power(values, ORDER), 0).to(tl.float64)
        peaks = tl.maximum(peaks, tl.max(magnitude_bits(values), 0))
    return tl.sum(sums, 0), tl.max(peaks, 0).to(WIDE, bitcast=True)


@triton.jit
def body_max(aligned, body, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The largest |x| of a tile's body (float64); NaN wins."""
    DTYPE: tl.constexpr = aligned.dtype.element_ty
    WIDE: tl.constexpr = tl.float64 if DTYPE.is_fp64() else tl.float32
    block, offsets = body_lanes(aligned, ROWS, COLUMNS)
    peaks = magnitude_bits(tl.zeros([COLUMNS], WIDE))
    for at in range(0, body, ROWS * COLUMNS):
        values = widen(tl.load(block + at, mask=at + offsets < body, other=0.0), WIDE)
        peaks = tl.maximum(peaks, tl.max(magnitude_bits(values), 0))
    return tl.max(peaks, 0).to(WIDE, bitcast=True).to(tl.float64)
