# mypy: ignore-errors
"""g <- coef * g in place, with given coefficients or with those of partial power sums."""

import triton
import triton.language as tl

from .combine import merge_partials
from .tile import INF, body_lanes, edge_lanes, gapped_lanes, locate, narrow, widen


@triton.jit
def scale_kernel(
    pointers,
    tiles,
    layouts,
    coefs,
    DTYPE: tl.constexpr,
    DIMS: tl.constexpr,
    ZERO_FILL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """``g <- coef * g`` over one tile; with ZERO_FILL, g <- 0 where coef is 0, so that inf and NaN vanish.

    Program: one tile, [ROWS, COLUMNS] elements at a time. Bytes: none of the gradient where coef is 1,
    otherwise each element read once and written once. Deterministic: elementwise.

    Further columns of ``tiles``: component, 1 for the component's first tile, layout. coefs: float32 or float64 [K].
    """
    row = tiles + tl.program_id(0).to(tl.int64) * 6
    coef = tl.load(coefs + tl.load(row + 3))
    if coef != 1.0:
        scale_tile(pointers, row, layouts, coef, coef == 0.0, DTYPE, DIMS, ZERO_FILL, ROWS, COLUMNS)


@triton.jit
def clip_kernel(
    pointers,
    tiles,
    layouts,
    partials,
    spans,
    caps,
    cap_stride,
    inverse,
    norms,
    coefs,
    found_inf,
    DTYPE: tl.constexpr,
    DIMS: tl.constexpr,
    ORDER: tl.constexpr,
    EPS: tl.constexpr,
    NONFINITE: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """``norm = (sum of partials)^(1/p); coef = min(1, cap / (norm + eps)); g <- coef * g`` over one tile.

    Program: one tile, as in ``scale_kernel``. Each computes its component's coefficient again, which repeats at most
    a few KB of reads from L2 and saves a launch; it needs the bucket's ``power_sums_kernel`` launches to come before
    on the same stream. Bytes: as ``scale_kernel``, and 8 for each of the component's partials. Deterministic:
    fixed order, so that all programs of a component get the same bits; the first one stores them.

    Args, beside those of ``scale_kernel``:
        partials: float64, contiguous for each component.
        spans: int64 [K + 1]: component c has partials[spans[c] : spans[c + 1]].
        caps: float64 [] or [K].
        cap_stride: elements between caps, 0 for one that all share.
        inverse: float64 [], what undoes the loss's scale; or None.
        norms: float32 or float64 [K], written.
        coefs: as norms, written.
        found_inf: float32 [], set to 1 if a component has an element that is inf or NaN; or None.
        EPS: added to the norm. Compiled in: a float argument would arrive rounded to float32.
        NONFINITE: "propagate", "zero" or "skip".
        CHUNK: partials read at a time, a power of two.
    """
    row = tiles + tl.program_id(0).to(tl.int64) * 6
    component = tl.load(row + 3)
    norm, coef, total = measured(
        component, partials, spans, caps, cap_stride, inverse, norms.dtype.element_ty, ORDER, EPS, NONFINITE, CHUNK
    )
    if tl.load(row + 4) != 0:
        report(component, norm, coef, total, norms, coefs, found_inf)
    factor = coef if inverse is None else coef.to(tl.float64) * tl.load(inverse)
    if factor != 1.0:
        scale_tile(pointers, row, layouts, factor, coef == 0.0, DTYPE, DIMS, NONFINITE == "zero", ROWS, COLUMNS)


@triton.jit
def measured(
    component,
    partials,
    spans,
    caps,
    cap_stride,
    inverse,
    DTYPE: tl.constexpr,
    ORDER: tl.constexpr,
    EPS: tl.constexpr,
    NONFINITE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Norm and coefficient of a component, in DTYPE, and its power sum before unscaling; see ``clip_kernel``."""
    total = merge_partials(partials, tl.load(spans + component), tl.load(spans + component + 1), ORDER, CHUNK)
    norm, coef = judged(component, total, caps, cap_stride, inverse, DTYPE, ORDER, EPS, NONFINITE)
    return norm, coef, total


@triton.jit
def judged(
    component,
    total,
    caps,
    cap_stride,
    inverse,
    DTYPE: tl.constexpr,
    ORDER: tl.constexpr,
    EPS: tl.constexpr,
    NONFINITE: tl.constexpr,
):
    """Norm and coefficient of a component, in DTYPE, from its power sum ``total``; see ``clip_kernel``."""
    norm = tl.sqrt(total) if ORDER == 2.0 else total
    if inverse is not None:
        norm = norm * tl.load(inverse)
    norm = norm.to(DTYPE)
    return norm, coefficient(norm, tl.load(caps + component * cap_stride), EPS, NONFINITE)


@triton.jit
def report(component, norm, coef, total, norms, coefs, found_inf):
    """Stores what one program of each component stores; see ``clip_kernel``."""
    tl.store(norms + component, norm)
    tl.store(coefs + component, coef)
    if found_inf is not None:  # noqa: SIM102  # one compile-time, one run-time
        if ~(tl.abs(total) < INF):
            tl.store(found_inf, 1.0)


@triton.jit
def coefficient(norm, cap, EPS: tl.constexpr, NONFINITE: tl.constexpr):
    """``formula.coefficients`` for one component: float64 arithmetic, rounded to the norm's type.

    Later lines win: nothing to clip over the non-finite policy, that over a bad cap, that over the rest.
    """
    padded = norm.to(tl.float64) + tl.full([], EPS, tl.float64)
    coef = tl.where(padded <= cap, 1.0, cap / padded)
    coef = tl.where(cap >= 0.0, coef, float("nan"))
    if NONFINITE == "zero" or NONFINITE == "skip":
        coef = tl.where(tl.abs(norm) < INF, coef, 0.0 if NONFINITE == "zero" else 1.0)
    return tl.where((cap == INF) | (norm == 0.0), 1.0, coef).to(norm.dtype)


@triton.jit
def scale_tile(
    pointers,
    row,
    layouts,
    coef,
    is_zero,
    DTYPE: tl.constexpr,
    DIMS: tl.constexpr,
    ZERO_FILL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """``g <- coef * g`` over the tile of one table row; with ZERO_FILL, g <- 0 if ``is_zero``."""
    if DIMS == 0:
        first, aligned, head, body, length = locate(pointers, row, DTYPE)
        edge, inside = edge_lanes(first, head, body, length)
        tl.store(edge, scaled(tl.load(edge, mask=inside, other=0.0), coef, is_zero, ZERO_FILL), mask=inside)
        block, offsets = body_lanes(aligned, ROWS, COLUMNS)
        for at in range(0, body, ROWS * COLUMNS):
            mask = at + offsets < body
            values = tl.load(block + at, mask=mask, other=0.0)
            tl.store(block + at, scaled(values, coef, is_zero, ZERO_FILL), mask=mask)
    else:
        layout = layouts + tl.load(row + 5)
        for at in range(0, tl.load(row + 2), COLUMNS):
            element, mask = gapped_lanes(pointers, row, layout, at, DTYPE, DIMS, COLUMNS)
            values = tl.load(element, mask=mask, other=0.0)
            tl.store(element, scaled(values, coef, is_zero, ZERO_FILL), mask=mask)


@triton.jit
def scaled(values, coef, is_zero, ZERO_FILL: tl.constexpr):
    """``coef * x``, half precisions by way of float32; +0 if ``is_zero``, with ZERO_FILL."""
    WIDE: tl.constexpr = tl.float64 if values.dtype.is_fp64() else tl.float32
    product = widen(values, WIDE) * coef.to(WIDE)
    if ZERO_FILL:
        product = tl.where(is_zero, 0.0, product)
    return narrow(product, values.dtype)
