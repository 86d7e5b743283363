# mypy: ignore-errors
"""A tile: a run of elements of one gradient, found through tables and walked in 16-byte steps.

A launch has one program for each row of a static tile table. So one launch serves any number of tensors, and what
differs between launches is data, not code. All kernels have these arguments in common:

    pointers        int64 [n], addresses of the gradients' first elements, which change from step to step
    tiles           int64 [programs, 6 or 7]: gradient, start, length (in elements), component, layout, and more
    layouts         int64, for tiles with gaps between their elements: see ``gapped_offsets``
    DTYPES          element types of the gradients of this launch; column 5 of ``tiles`` says which of them a tile has
    DTYPE           the one of a tile, or of all in a launch of ``adamw.py``
    DIMS            dimensions of the layouts, 0 where there are no gaps
    ORDER           order p of the norm: 1.0, 2.0 or inf
    ROWS, THREADS   a program works on blocks of ROWS times 16 bytes for each thread, in [ROWS, COLUMNS] elements

Tiles without gaps may start anywhere: each peels off the few elements before its first and after its last 16-byte
boundary, and everything between, its body, moves in aligned 16-byte loads and stores.
"""

import triton
import triton.knobs
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
VECTOR_BYTES = tl.constexpr(16)
INF = tl.constexpr(float("inf"))


@triton.jit
def locate(pointers, row, DTYPE: tl.constexpr):
    """Where the tile of one table row lies.

    Returns:
        ``first``, ``aligned``: pointers to the tile's first element and to its first 16-byte boundary.
        ``head``, ``body``: elements before that boundary, and in whole 16-byte vectors from there on.
        ``length``: all elements; those after head + body are fewer than a vector.
    """
    SIZE: tl.constexpr = DTYPE.primitive_bitwidth // 8
    VECTOR: tl.constexpr = VECTOR_BYTES // SIZE
    # 64 bits for addresses, 32 inside a tile: a tensor may have more than 2^31 elements, a tile has not.
    address = tl.load(pointers + tl.load(row)) + tl.load(row + 1) * SIZE
    length = tl.load(row + 2).to(tl.int32)
    boundary = (address + (VECTOR_BYTES - 1)) // VECTOR_BYTES * VECTOR_BYTES
    head = tl.minimum((boundary - address).to(tl.int32) // SIZE, length)
    # The compiler uses wide loads because of the hint here and because a multiple of VECTOR ends the mask.
    aligned = tl.multiple_of(boundary.to(tl.pointer_type(DTYPE)), [VECTOR_BYTES])
    body = (length - head) // VECTOR * VECTOR
    return address.to(tl.pointer_type(DTYPE)), aligned, head, body, length


@triton.jit
def body_lanes(aligned, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Pointers to and offsets of the body's first [ROWS, COLUMNS] elements, which are contiguous."""
    offsets = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return aligned + offsets, offsets


@triton.jit
def edge_lanes(first, head, body, length):
    """Pointers to and mask of the elements outside the body: a vector's lanes before it, as many after it."""
    VECTOR: tl.constexpr = VECTOR_BYTES // (first.dtype.element_ty.primitive_bitwidth // 8)
    lane = tl.arange(0, 2 * VECTOR)
    offset = tl.where(lane < VECTOR, lane, lane - VECTOR + head + body)
    return first + offset, offset < tl.where(lane < VECTOR, head, length)


@triton.jit
def gapped_lanes(pointers, row, layouts, at, DTYPE: tl.constexpr, DIMS: tl.constexpr, COLUMNS: tl.constexpr):
    """Pointers to and mask of elements [at, at + COLUMNS) of the tile of one table row, where memory has gaps."""
    offset, mask = gapped_offsets(row, layouts, at, DIMS, COLUMNS)
    first = tl.load(pointers + tl.load(row)).to(tl.pointer_type(DTYPE))
    return first + offset, mask


@triton.jit
def gapped_offsets(row, layouts, at, DIMS: tl.constexpr, COLUMNS: tl.constexpr):
    """Offsets of these elements from the gradient's first, and their mask.

    The tile's layout is the place in ``layouts`` of the offset of its run from the gradient's first element, and then
    of size and stride of each dimension, innermost first. The tile's start is an index into that run.
    """
    layout = layouts + tl.load(row + 4)
    lane = at + tl.arange(0, COLUMNS)
    index = tl.load(row + 1) + lane
    offset = tl.load(layout) + 0 * index
    for dim in tl.static_range(DIMS):
        size = tl.load(layout + 1 + 2 * dim)
        offset += index % size * tl.load(layout + 2 + 2 * dim)
        index = index // size
    return offset, lane < tl.load(row + 2)


@triton.jit
def widen(values, WIDE: tl.constexpr):
    """To ``WIDE``, exactly."""
    if INTERPRETED and values.dtype.is_bf16():  # Triton's interpreter gets subnormals wrong
        bits = values.to(tl.int16, bitcast=True).to(tl.int32) << 16
        return bits.to(tl.float32, bitcast=True).to(WIDE)
    return values.to(WIDE)


@triton.jit
def narrow(values, DTYPE: tl.constexpr):
    """To ``DTYPE``, rounded once, to nearest even."""
    if INTERPRETED and DTYPE.is_bf16():  # Triton's interpreter cuts off instead of rounding
        bits = values.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(values == values, rounded, 0x7FC0).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return values.to(DTYPE)


@triton.jit
def magnitude_bits(values):
    """The bits of |x| as an integer, which compare as |x| does, with NaN above inf.

    An integer maximum of them is exact and keeps NaN everywhere; the floating-point maximum of some GPUs
    and of Triton's reductions drops it.
    """
    if values.dtype.is_fp64():
        return values.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    else:  # the compiler wants one return for each branch
        return values.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def larger(a, b):
    """max(|a|, |b|) of float64 values; NaN wins."""
    return tl.maximum(magnitude_bits(a), magnitude_bits(b)).to(tl.float64, bitcast=True)


@triton.jit
def largest(values):
    """The largest |x| of a float64 vector; NaN wins."""
    return tl.max(magnitude_bits(values), 0).to(tl.float64, bitcast=True)
