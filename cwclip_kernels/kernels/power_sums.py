# mypy: ignore-errors
"""Partial power sums: the one pass over all gradients that every norm needs."""

import triton
import triton.language as tl

from .tile import (
    INF,
    VECTOR_BYTES,
    body_lanes,
    edge_lanes,
    gapped_lanes,
    larger,
    largest,
    locate,
    magnitude_bits,
    widen,
)

# A float32 sum is trusted if it is finite, since then nothing overflowed, and at least this: what 2^17 squares lose
# by underflow (2^-126 each, if subnormals are flushed) is below 2^-28 of it. Otherwise the tile is read again in
# float64, unless all of it is 0, as most rows of an embedding's gradient are.
TRUSTED_FROM = tl.constexpr(2.0**-80)


@triton.jit
def power_sums_kernel(
    pointers,
    tiles,
    layouts,
    partials,
    DTYPES: tl.constexpr,
    DIMS: tl.constexpr,
    ORDER: tl.constexpr,
    ROWS: tl.constexpr,
    THREADS: tl.constexpr,
):
    """``partials[slot]`` = sum |g|^p over one tile, max |g| for p = inf; NaN and inf come out as themselves.

    Program: one tile, ROWS vectors a thread at a time. Bytes: each element once, and 8 written.
    Deterministic: fixed order, one writer for each slot. The order is that of the tile's 16-byte vectors, so
    equal gradients at addresses that differ modulo 16 may differ in the norm's last bits.

    Accuracy: float32 adds up what one thread has of a block, at most 8 vectors of 8 elements, by columns and then
    along the vector: at most 14 roundings of 2^-24 each, 8.4e-7 of a sum and half of that of its root, usually far
    less. All else is added in float64.

    Last column of ``tiles``: slot among the ``partials``, which are float64. The rest is ``tile``'s.
    """
    row = tiles + tl.program_id(0).to(tl.int64) * 7
    total = sum_of_any(pointers, row, layouts, DTYPES, DIMS, ORDER, ROWS, THREADS)
    tl.store(partials + tl.load(row + 6), total)


@triton.jit
def sum_of_any(
    pointers,
    row,
    layouts,
    DTYPES: tl.constexpr,
    DIMS: tl.constexpr,
    ORDER: tl.constexpr,
    ROWS: tl.constexpr,
    THREADS: tl.constexpr,
):
    """The power sum of the tile of one table row, of any of these types."""
    total = tl.full([], 0.0, tl.float64)
    if len(DTYPES) == 1:
        total = tile_sum(pointers, row, layouts, DTYPES[0], DIMS, ORDER, ROWS, THREADS)
    else:
        kind = tl.load(row + 5)
        for i in tl.static_range(len(DTYPES)):
            if kind == i:
                total = tile_sum(pointers, row, layouts, DTYPES[i], DIMS, ORDER, ROWS, THREADS)
    return total


@triton.jit
def tile_sum(
    pointers,
    row,
    layouts,
    DTYPE: tl.constexpr,
    DIMS: tl.constexpr,
    ORDER: tl.constexpr,
    ROWS: tl.constexpr,
    THREADS: tl.constexpr,
):
    """The power sum of the tile of one table row."""
    if DIMS == 0:
        total = dense_sum(pointers, row, DTYPE, ORDER, ROWS, THREADS)
    else:
        COLUMNS: tl.constexpr = THREADS * VECTOR_BYTES // (DTYPE.primitive_bitwidth // 8)
        total = gapped_sum(pointers, row, layouts, DTYPE, DIMS, ORDER, COLUMNS)
    return total


@triton.jit
def dense_sum(pointers, row, DTYPE: tl.constexpr, ORDER: tl.constexpr, ROWS: tl.constexpr, THREADS: tl.constexpr):
    """The power sum of one tile without gaps."""
    first, aligned, head, body, length = locate(pointers, row, DTYPE)
    edge, mask = edge_lanes(first, head, body, length)
    edges = widen(tl.load(edge, mask=mask, other=0.0), tl.float64)
    if ORDER == INF:
        total = larger(body_max(aligned, body, ROWS, THREADS), largest(edges))
    else:
        WIDE: tl.constexpr = tl.float64 if DTYPE.is_fp64() else tl.float32
        total, bits = body_sum(aligned, body, ORDER, WIDE, ROWS, THREADS)
        # Squares of float16 always fit float32.
        if DTYPE.is_fp32() or DTYPE.is_bf16():  # noqa: SIM102  # one compile-time, one run-time
            if ~(total < INF) | ((total < TRUSTED_FROM) & (bits != 0)):
                # One row at a time: a path hardly ever taken must not set the register count.
                total, _ = body_sum(aligned, body, ORDER, tl.float64, 1, THREADS)
        total += tl.sum(power(edges, ORDER), 0)
    return total


@triton.jit
def gapped_sum(
    pointers, row, layouts, DTYPE: tl.constexpr, DIMS: tl.constexpr, ORDER: tl.constexpr, COLUMNS: tl.constexpr
):
    """The power sum of one tile with gaps, in float64 throughout."""
    sums = tl.zeros([COLUMNS], tl.float64)
    for at in range(0, tl.load(row + 2), COLUMNS):
        element, mask = gapped_lanes(pointers, row, layouts, at, DTYPE, DIMS, COLUMNS)
        values = widen(tl.load(element, mask=mask, other=0.0), tl.float64)
        sums = larger(sums, values) if ORDER == INF else sums + power(values, ORDER)
    return largest(sums) if ORDER == INF else tl.sum(sums, 0)


@triton.jit
def power(values, ORDER: tl.constexpr):
    """|x|^p for p = 1 or 2."""
    return values * values if ORDER == 2.0 else tl.abs(values)


@triton.jit
def body_sum(aligned, body, ORDER: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, THREADS: tl.constexpr):
    """Sum |x|^p over a tile's body (float64; blocks added in WIDE), and a number that is 0 only if every x is 0.

    A thread has one accumulator, not one for each element of a vector, which leaves registers for loads in flight.
    """
    block, offsets, whole, count = body_blocks(aligned, body, ROWS, THREADS)
    sums = tl.zeros([THREADS], tl.float64)
    bits = tl.zeros([THREADS], tl.uint32)
    for at in range(0, whole, ROWS * offsets.shape[1]):
        values = tl.load(block + at)
        sums += block_sum(values, ORDER, WIDE, THREADS)
        bits = tl.maximum(bits, block_bits(values, THREADS))
    if whole < count:
        values = tl.load(block + whole, mask=whole + offsets < count, other=0)
        sums += block_sum(values, ORDER, WIDE, THREADS)
        bits = tl.maximum(bits, block_bits(values, THREADS))
    return tl.sum(sums, 0), tl.max(bits, 0)


@triton.jit
def body_max(aligned, body, ROWS: tl.constexpr, THREADS: tl.constexpr):
    """The largest |x| of a tile's body (float64); NaN wins."""
    WIDE: tl.constexpr = tl.float64 if aligned.dtype.element_ty.is_fp64() else tl.float32
    block, offsets, whole, count = body_blocks(aligned, body, ROWS, THREADS)
    peaks = magnitude_bits(tl.zeros([THREADS], WIDE))
    for at in range(0, whole, ROWS * offsets.shape[1]):
        peaks = tl.maximum(peaks, block_max(tl.load(block + at), WIDE, THREADS))
    if whole < count:
        values = tl.load(block + whole, mask=whole + offsets < count, other=0)
        peaks = tl.maximum(peaks, block_max(values, WIDE, THREADS))
    return tl.max(peaks, 0).to(WIDE, bitcast=True).to(tl.float64)


@triton.jit
def body_blocks(aligned, body, ROWS: tl.constexpr, THREADS: tl.constexpr):
    """How to walk over a tile's body, 16 bytes a thread and row; bfloat16 goes in pairs, as 4-byte words.

    Returns:
        Pointers to and offsets of the first block, how much of the body lies in whole blocks, and all of it.
        Loads of whole blocks need no mask, hence fewer registers.
    """
    if aligned.dtype.element_ty.is_bf16():
        aligned = tl.multiple_of(aligned.to(tl.pointer_type(tl.int32)), [VECTOR_BYTES])
        body = body // 2
    WIDTH: tl.constexpr = THREADS * VECTOR_BYTES // (aligned.dtype.element_ty.primitive_bitwidth // 8)
    block, offsets = body_lanes(aligned, ROWS, WIDTH)
    return block, offsets, body // (ROWS * WIDTH) * (ROWS * WIDTH), body


@triton.jit
def block_sum(values, ORDER: tl.constexpr, WIDE: tl.constexpr, THREADS: tl.constexpr):
    """Sum |x|^p of what each thread has of a block: float64 [THREADS], added in WIDE."""
    if values.dtype.is_int32():
        low, high = halves(values)
        powers = power(low.to(WIDE), ORDER) + power(high.to(WIDE), ORDER)
    else:
        powers = power(values.to(WIDE), ORDER)
    return tl.sum(tl.sum(by_thread(powers, THREADS), 0), 1).to(tl.float64)


@triton.jit
def block_max(values, WIDE: tl.constexpr, THREADS: tl.constexpr):
    """The largest ``magnitude_bits`` of what each thread has of a block, as WIDE: integers [THREADS]."""
    if values.dtype.is_int32():
        low, high = halves(values)
        found = tl.maximum(magnitude_bits(low), magnitude_bits(high))
    else:
        found = magnitude_bits(values.to(WIDE))
    return tl.max(tl.max(by_thread(found, THREADS), 0), 1)


@triton.jit
def block_bits(values, THREADS: tl.constexpr):
    """Of what each thread has of a block a number that is 0 only if all of it is: uint32 [THREADS]."""
    if values.dtype.primitive_bitwidth == 32:
        found = tl.max(tl.max(by_thread(values.to(tl.uint32, bitcast=True), THREADS), 0), 1)
    else:  # not asked for
        found = tl.zeros([THREADS], tl.uint32)
    return found


@triton.jit
def halves(words):
    """Two bfloat16 each, as float32, exactly."""
    return (words << 16).to(tl.float32, bitcast=True), (words & -0x10000).to(tl.float32, bitcast=True)


@triton.jit
def by_thread(block, THREADS: tl.constexpr):
    """A block as rows, threads, and what a thread has of a row."""
    return tl.reshape(block, [block.shape[0], THREADS, block.shape[1] // THREADS])
