# mypy: ignore-errors
"""Partial power sums to fewer partials, or to the sum of each component. Float64 throughout."""

import triton
import triton.language as tl

from .tile import INF, larger, largest


@triton.jit
def merge_partials(partials, first, last, ORDER: tl.constexpr, CHUNK: tl.constexpr):
    """The sum, or for ORDER = inf the maximum, of partials[first:last]; 0 if there are none.

    CHUNK lanes take every CHUNK-th partial and are then reduced in a tree: the order of additions depends on
    the number of partials only.
    """
    lanes = tl.arange(0, CHUNK)
    if ORDER == INF:
        peaks = tl.zeros([CHUNK], tl.float64)
        for at in range(first, last, CHUNK):
            peaks = larger(peaks, tl.load(partials + at + lanes, mask=at + lanes < last, other=0.0))
        return largest(peaks)
    else:
        sums = tl.zeros([CHUNK], tl.float64)
        for at in range(first, last, CHUNK):
            sums += tl.load(partials + at + lanes, mask=at + lanes < last, other=0.0)
        return tl.sum(sums, 0)


@triton.jit
def combine_kernel(partials, spans, sums, ORDER: tl.constexpr, CHUNK: tl.constexpr):
    """``sums[j]`` = sum (max for ORDER = inf) of partials[spans[j] : spans[j + 1]].

    Program: one j. Bytes: 8 for each partial, once. Deterministic: fixed order, one writer for each sum.

    Args:
        partials: float64, contiguous for each j.
        spans: int64 [programs + 1], offsets into ``partials``.
        sums: float64 [programs], written.
        ORDER: 1.0, 2.0 or inf.
        CHUNK: partials read at a time, a power of two.
    """
    j = tl.program_id(0).to(tl.int64)
    merged = merge_partials(partials, tl.load(spans + j), tl.load(spans + j + 1), ORDER, CHUNK)
    tl.store(sums + j, merged)
