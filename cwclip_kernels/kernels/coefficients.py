# mypy: ignore-errors
"""From the power sum of a component to its norm and coefficient."""

import triton
import triton.language as tl

from .combine import merge_partials
from .tile import INF


@triton.jit
def coefficients_kernel(
    components,
    partials,
    spans,
    caps,
    cap_stride,
    inverse,
    norms,
    coefs,
    found_inf,
    factors,
    ORDER: tl.constexpr,
    EPS: tl.constexpr,
    NONFINITE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """``norm = (sum of partials)^(1/p); coef = min(1, cap / (norm + eps)); factor = coef * inverse``, by component.

    Program: one component. Bytes: 8 for each partial, once. A launch of its own, since the tiles of a component are
    many: each of them would read all partials again, add them up in float64, and take a root and a quotient: 480
    instructions a thread on sm_90 before its first gradient, where ``scale_kernel`` has at most 80.
    Deterministic: fixed order, one writer for each result.

    Args:
        components: int64 [programs], those to be measured here. No partials: norm 0, coefficient 1.
        partials: float64, contiguous for each component.
        spans: int64 [K + 1]: component c has partials[spans[c] : spans[c + 1]].
        caps: float64 [] or [K].
        cap_stride: elements between caps, 0 for one that all share.
        inverse: float64 [], what undoes the loss's scale; or None.
        norms: float32 or float64 [K], written.
        coefs: as norms, written.
        found_inf: float32 [], set to 1 if a component has an element that is inf or NaN; or None.
        factors: float64 [K], written; None without ``inverse``, where they are the coefficients.
        ORDER: 1.0, 2.0 or inf.
        EPS: added to the norm. Compiled in: a float argument would arrive rounded to float32.
        NONFINITE: "propagate", "zero" or "skip".
        CHUNK: partials read at a time, a power of two.
    """
    component = tl.load(components + tl.program_id(0))
    total = merge_partials(partials, tl.load(spans + component), tl.load(spans + component + 1), ORDER, CHUNK)
    # fmt: off
    factor = judge(component, total, caps, cap_stride, inverse, norms, coefs, found_inf, ORDER, EPS, NONFINITE)
    # fmt: on
    if factors is not None:
        tl.store(factors + component, factor)


@triton.jit
def judge(
    component,
    total,
    caps,
    cap_stride,
    inverse,
    norms,
    coefs,
    found_inf,
    ORDER: tl.constexpr,
    EPS: tl.constexpr,
    NONFINITE: tl.constexpr,
):
    """Stores norm and coefficient of a component with power sum ``total``; what to multiply its gradients with."""
    norm = tl.sqrt(total) if ORDER == 2.0 else total
    if inverse is not None:
        norm = norm * tl.load(inverse)
    norm = norm.to(norms.dtype.element_ty)
    coef = coefficient(norm, tl.load(caps + component * cap_stride), EPS, NONFINITE)
    tl.store(norms + component, norm)
    tl.store(coefs + component, coef)
    if found_inf is not None:  # noqa: SIM102  # one compile-time, one run-time
        if ~(tl.abs(total) < INF):
            tl.store(found_inf, 1.0)
    return coef if inverse is None else coef.to(tl.float64) * tl.load(inverse)


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
