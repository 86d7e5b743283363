# mypy: ignore-errors
"""The step of AdamW on gradients times their factors, which are never written: ``core.adamw``."""

import triton
import triton.language as tl

from .tile import VECTOR_BYTES, gapped_offsets, narrow, widen


@triton.jit(do_not_specialize=["count"])
def advance_kernel(states, count, rule_of, rules, skip, scalars, TIME: tl.constexpr, BLOCK: tl.constexpr):
    """``t <- t + 1`` for each gradient, and what its elements are multiplied with in this step.

    Program: BLOCK gradients. Bytes: some 200 for each. Deterministic: elementwise, float64.

    Args:
        states: int64, the table of addresses of ``adamw_kernel``.
        count: number of gradients n.
        rule_of: int64 [n], row of ``rules`` for each gradient.
        rules: float64 [R, 9]: lr, log beta1 and log beta2 (-inf for no bias correction), beta1, beta2, eps, weight
            decay, sign of the gradient, and how lr is given: 0 as itself, 4 or 8 as the address of a float32 or
            float64.
        skip: float32 []; t stays as it is unless that is 0. Or None.
        scalars: float64 [n, 8], written: 1 - lr * weight decay, lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t),
            1 - beta1, beta2, 1 - beta2, eps, sign.
        TIME: type of t.
        BLOCK: a power of two.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    t_at = tl.load(states + 3 * count + i, mask=inside, other=0).to(tl.pointer_type(TIME))
    t = tl.load(t_at, mask=inside, other=0.0).to(tl.float64)
    t += 1.0 if skip is None else (tl.load(skip) == 0.0).to(tl.float64)
    tl.store(t_at, t.to(TIME), mask=inside)

    rule = rules + tl.load(rule_of + i, mask=inside, other=0) * 9
    lr = tl.load(rule)
    kind = tl.load(rule + 8)
    address = lr.to(tl.int64, bitcast=True)
    single = tl.load(address.to(tl.pointer_type(tl.float32)), mask=kind == 4.0, other=0.0).to(tl.float64)
    double = tl.load(address.to(tl.pointer_type(tl.float64)), mask=kind == 8.0, other=0.0)
    lr = tl.where(kind == 0.0, lr, tl.where(kind == 4.0, single, double))

    # beta^t; t is 0 only where nothing is stepped.
    power1 = tl.exp(tl.maximum(t, 1.0) * tl.load(rule + 1))
    power2 = tl.exp(tl.maximum(t, 1.0) * tl.load(rule + 2))
    out = scalars + i * 8
    tl.store(out, 1.0 - lr * tl.load(rule + 6), mask=inside)
    tl.store(out + 1, lr / (1.0 - power1), mask=inside)
    tl.store(out + 2, 1.0 / tl.sqrt(1.0 - power2), mask=inside)
    tl.store(out + 3, 1.0 - tl.load(rule + 3), mask=inside)
    tl.store(out + 4, tl.load(rule + 4), mask=inside)
    tl.store(out + 5, 1.0 - tl.load(rule + 4), mask=inside)
    tl.store(out + 6, tl.load(rule + 5), mask=inside)
    tl.store(out + 7, tl.load(rule + 7), mask=inside)


@triton.jit(do_not_specialize=["count"])
def adamw_kernel(
    pointers,
    tiles,
    layouts,
    factors,
    states,
    count,
    scalars,
    skip,
    GRAD: tl.constexpr,
    PARAM: tl.constexpr,
    STATE: tl.constexpr,
    AMSGRAD: tl.constexpr,
    DIMS: tl.constexpr,
    ZERO_FILL: tl.constexpr,
    COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
):
    """``m, v, p <- AdamW(factor * g)``, with AMSGRAD w too, over one tile; nothing where ``skip`` is not 0.

    Program: one tile, COLUMNS elements at a time, of all tensors. With four tensors to read and few registers, that
    is enough in flight. Bytes for each element, in float32: 16 read and 12 written; with AMSGRAD 20 and 16.
    Deterministic: elementwise. Float32 arithmetic, float64 for float64; each result is rounded once.

    What lies outside whole 16-byte vectors goes element by element, LANES at a time, and so does a tile whose tensors
    don't have their 16-byte boundaries at the same elements, or have gaps.

    Last column of ``tiles``: place of w's address in ``states``. Args, beside ``tile``'s:
        factors: float32 or float64 [K], for g; with ZERO_FILL, 0 erases inf and NaN.
        states: int64, addresses of all p, then all m, v, t, and the w that there are.
        count: number of gradients n.
        scalars: float64 [n, 8], from ``advance_kernel``.
        skip: float32 [] or None.
        GRAD, PARAM, STATE: element types of g; p; m, v and w.
        COLUMNS, LANES: powers of two.
    """
    row = tiles + tl.program_id(0).to(tl.int64) * 6
    factor = tl.load(factors + tl.load(row + 3))
    # fmt: off
    step_tile(pointers, row, layouts, factor, states, count, scalars, skip, GRAD, PARAM, STATE, AMSGRAD, DIMS,
              ZERO_FILL, COLUMNS, LANES)
    # fmt: on


@triton.jit
def step_tile(
    pointers,
    row,
    layouts,
    factor,
    states,
    count,
    scalars,
    skip,
    GRAD: tl.constexpr,
    PARAM: tl.constexpr,
    STATE: tl.constexpr,
    AMSGRAD: tl.constexpr,
    DIMS: tl.constexpr,
    ZERO_FILL: tl.constexpr,
    COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
):
    """The step of the tile of one table row, of g times ``factor``; the rest is ``adamw_kernel``'s."""
    runs = True
    if skip is not None:
        runs = tl.load(skip) == 0.0
    if runs:
        WIDE: tl.constexpr = tl.float64 if PARAM.is_fp64() else tl.float32
        i = tl.load(row)
        kept = states + i
        own = scalars + i * 8
        is_zero = factor == 0.0
        times = factor.to(WIDE) * tl.load(own + 7).to(WIDE)
        decay = tl.load(own).to(WIDE)
        size = tl.load(own + 1).to(WIDE)
        root = tl.load(own + 2).to(WIDE)
        rate1 = tl.load(own + 3).to(WIDE)
        beta2 = tl.load(own + 4).to(WIDE)
        rate2 = tl.load(own + 5).to(WIDE)
        eps = tl.load(own + 6).to(WIDE)
        start = tl.load(row + 1) if DIMS == 0 else 0
        length = tl.load(row + 2).to(tl.int32)
        g_at = element_address(pointers + i, start, GRAD)
        p_at = element_address(kept, start, PARAM)
        m_at = element_address(kept + count, start, STATE)
        v_at = element_address(kept + 2 * count, start, STATE)
        w_at = element_address(states + tl.load(row + 5), start, STATE) if AMSGRAD else v_at
        g = g_at.to(tl.pointer_type(GRAD))
        p = p_at.to(tl.pointer_type(PARAM))
        m = m_at.to(tl.pointer_type(STATE))
        v = v_at.to(tl.pointer_type(STATE))
        w = w_at.to(tl.pointer_type(STATE))
        body = 0
        if DIMS == 0:
            head, body = common_body(g_at, p_at, m_at, v_at, w_at, length, GRAD, PARAM, STATE)
        for at in range(0, length - body, LANES):
            if DIMS == 0:
                lane = at + tl.arange(0, LANES)
                offset = tl.where(lane < head, lane, lane + body)
                mask = lane < length - body
            else:
                offset, mask = gapped_offsets(row, layouts, at, DIMS, LANES)
            # fmt: off
            step(g + offset, p + offset, m + offset, v + offset, w + offset, mask, times, is_zero, decay, size, root,
                 rate1, beta2, rate2, eps, AMSGRAD, ZERO_FILL)
            # fmt: on
        if DIMS == 0:
            g = tl.multiple_of(g + head, [VECTOR_BYTES])
            p = tl.multiple_of(p + head, [VECTOR_BYTES])
            m = tl.multiple_of(m + head, [VECTOR_BYTES])
            v = tl.multiple_of(v + head, [VECTOR_BYTES])
            w = tl.multiple_of(w + head, [VECTOR_BYTES])
            for at in range(0, body, COLUMNS):
                offset = at + tl.arange(0, COLUMNS)
                mask = offset < body
                # fmt: off
                step(g + offset, p + offset, m + offset, v + offset, w + offset, mask, times, is_zero, decay, size,
                     root, rate1, beta2, rate2, eps, AMSGRAD, ZERO_FILL)
                # fmt: on


@triton.jit
def element_address(base, start, DTYPE: tl.constexpr):
    """The address of element ``start`` of the tensor whose address is at ``base``."""
    return tl.load(base) + start * (DTYPE.primitive_bitwidth // 8)


@triton.jit
def common_body(g_at, p_at, m_at, v_at, w_at, length, GRAD: tl.constexpr, PARAM: tl.constexpr, STATE: tl.constexpr):
    """Elements before the first 16-byte boundary, and in whole vectors from there on: 0 if these differ by tensor."""
    # Parameters have the smallest elements, hence the most in a vector.
    SIZE: tl.constexpr = PARAM.primitive_bitwidth // 8
    VECTOR: tl.constexpr = VECTOR_BYTES // SIZE
    boundary = (p_at + (VECTOR_BYTES - 1)) // VECTOR_BYTES * VECTOR_BYTES
    head = tl.minimum((boundary - p_at).to(tl.int32) // SIZE, length)
    off = misalignment(g_at, head, GRAD) | misalignment(m_at, head, STATE)
    off |= misalignment(v_at, head, STATE) | misalignment(w_at, head, STATE)
    return head, tl.where(off == 0, (length - head) // VECTOR * VECTOR, 0)


@triton.jit
def misalignment(address, head, DTYPE: tl.constexpr):
    """How far the address of the element ``head`` further on is from a 16-byte boundary."""
    return (address + head * (DTYPE.primitive_bitwidth // 8)) % VECTOR_BYTES


@triton.jit
def step(
    g_at,
    p_at,
    m_at,
    v_at,
    w_at,
    mask,
    factor,
    is_zero,
    decay,
    size,
    root,
    rate1,
    beta2,
    rate2,
    eps,
    AMSGRAD: tl.constexpr,
    ZERO_FILL: tl.constexpr,
):
    """One block of elements: g times ``factor``, or 0 if ``is_zero``, with ZERO_FILL, into m, v, w and p."""
    WIDE: tl.constexpr = factor.dtype
    STATE: tl.constexpr = m_at.dtype.element_ty
    # All loads come first, so that they are in flight together.
    g = tl.load(g_at, mask=mask, other=0.0)
    m = tl.load(m_at, mask=mask, other=0.0)
    v = tl.load(v_at, mask=mask, other=0.0)
    w = tl.load(w_at, mask=mask, other=0.0) if AMSGRAD else v
    p = tl.load(p_at, mask=mask, other=0.0)
    g = widen(g, WIDE) * factor
    if ZERO_FILL:
        g = tl.where(is_zero, 0.0, g)
    m = widen(m, WIDE)
    # The same number either way; of the second rounding leaves g itself if beta1 is 0.
    m = tl.where(rate1 < 0.5, m + rate1 * (g - m), g - (1 - rate1) * (g - m))
    v = beta2 * widen(v, WIDE) + rate2 * g * g
    tl.store(m_at, narrow(m, STATE), mask=mask)
    tl.store(v_at, narrow(v, STATE), mask=mask)
    if AMSGRAD:
        w = widen(w, WIDE)
        v = tl.where((v > w) | (v != v), v, w)  # NaN wins
        tl.store(w_at, narrow(v, STATE), mask=mask)
    p = widen(p, WIDE)
    if WIDE.is_fp64():
        p = decay * p - size * (m / (tl.sqrt(v) * root + eps))
    else:  # the plain operators are approximations
        p = decay * p - size * tl.div_rn(m, tl.sqrt_rn(v) * root + eps)
    tl.store(p_at, narrow(p, p_at.dtype.element_ty), mask=mask)
