"""torch._foreach operations: works wherever torch does, and needs nothing compiled.

Reads every gradient once for its norm, then reads and writes every gradient, clipped or not (3N bytes).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..core.adamw import AdamWRule, AdamWStep
from ..core.bucket import Bucket
from ..core.formula import merged, neutral, wide_dtype


def refuses(device: torch.device, dtype: torch.dtype, norm_type: float) -> str | None:
    """Serves every device, dtype and order that torch serves."""
    return None


def power_sums(bucket: Bucket, grads: list[Tensor], norm_type: float, addresses: bytes | None) -> Tensor:
    """sum |g|^p of each component, [K] in ``wide_dtype``; max |g| for p = inf, min for -inf, count for 0."""
    # A wide accumulator, because torch's float32 norm of 30 M values is off by 1e-3 on a CPU, and overflows.
    measurable = [_measurable(g, norm_type) for g in bucket.pieces(grads)]
    each = torch.stack(torch._foreach_norm(measurable, norm_type, dtype=wide_dtype(bucket.device)))
    if not math.isinf(norm_type) and norm_type != 0.0:
        each = each**norm_type
    nothing = each.new_full((1,), neutral(norm_type))
    for level in _state(bucket)[0]:
        each = merged(torch.cat((each, nothing))[level], norm_type)
    return each


_ROW = 256


def _measurable(grad: Tensor, norm_type: float) -> Tensor:
    """A tensor with the gradient's norm that torch can measure exactly: real, not empty, no sum too long."""
    if grad.numel() == 0:
        # torch has no norm of nothing for inf and negative orders. This adds 0 to a sum and never is the extremum.
        return torch.full((1,), math.inf if norm_type < 0 else 0.0, device=grad.device)
    if grad.is_complex():
        grad = grad.abs()
    if grad.numel() <= 16 * _ROW or norm_type == 0.0:
        return grad
    if grad.dtype == torch.float64:
        return _row_norms(grad, norm_type)  # torch adds it up in its own precision, in sequence
    if grad.device.type == "cpu" and norm_type == 2.0:
        # A CPU converts the whole tensor to get a float64 norm: ten times the time. Rows are short enough for float32
        # where no square overflows or vanishes in it, which is seen from the result (there is no sync on a CPU).
        rows = _row_norms(grad, norm_type)
        if 1e-15 * math.sqrt(grad.numel()) <= torch.linalg.vector_norm(rows, dtype=torch.float64) < math.inf:
            return rows
    return grad


def _row_norms(grad: Tensor, norm_type: float) -> Tensor:
    """The norms of rows of the gradient, and what is left over: a tensor with the same norm."""
    flat = grad.reshape(-1)
    whole = flat.numel() // _ROW * _ROW
    wide = torch.promote_types(grad.dtype, torch.float32)
    rows = torch.linalg.vector_norm(flat[:whole].view(-1, _ROW), norm_type, dim=1, dtype=wide)
    return torch.cat((rows, flat[whole:].to(wide)))


def _state(bucket: Bucket) -> tuple[list[Tensor], Tensor]:
    """What a bucket keeps from call to call: ``_merge_levels``, and the component of each piece, on the device."""
    if bucket.state is None:
        bucket.state = _merge_levels(bucket), bucket.components.to(bucket.device)
    state: tuple[list[Tensor], Tensor] = bucket.state
    return state


_FAN_IN = 32


def _merge_levels(bucket: Bucket) -> list[Tensor]:
    """Gather indices that merge per-tensor values [n] into [K], ``_FAN_IN`` at a time.

    A tree with a fixed shape gives the same bits every run, which a scatter-add on a GPU does not, and stays
    small however unevenly tensors are spread over components. Index n stands for "nothing".
    """
    members: list[list[int]] = [[] for _ in range(bucket.count)]
    for position, component in enumerate(bucket.components.tolist()):
        members[component].append(position)
    size = bucket.components.numel()
    levels = []
    while True:
        chunks = [[m[i : i + _FAN_IN] for i in range(0, max(len(m), 1), _FAN_IN)] for m in members]
        rows = [chunk for parts in chunks for chunk in parts]
        width = max(map(len, rows))
        index = torch.tensor([row + [size] * (width - len(row)) for row in rows], dtype=torch.int64, device="cpu")
        levels.append(index.to(bucket.device))
        if len(rows) == bucket.count:
            return levels
        row_ids = iter(range(len(rows)))
        members = [[next(row_ids) for _ in parts] for parts in chunks]
        size = len(rows)


def scale_(bucket: Bucket, grads: list[Tensor], coefs: Tensor, zero_fill: bool, addresses: bytes | None) -> None:
    """g <- coef * g in place; of a complex gradient both parts, since a complex product makes NaN of inf + 0j."""
    grads = [torch.view_as_real(g) if g.is_complex() else g for g in bucket.pieces(grads)]
    each = coefs[_state(bucket)[1]]
    factors = _factors(grads, each)
    if bucket.device.type == "cpu":
        torch._foreach_mul_(grads, factors)
    else:
        _multiply(grads, factors)
    if zero_fill:  # not where a factor has only been rounded to 0
        for grad, is_zero in zip(grads, (each == 0).unbind(), strict=True):
            grad.masked_fill_(is_zero, 0.0)


def _factors(grads: list[Tensor], factors: Tensor) -> list[Tensor]:
    """The factor of each gradient, [], never wider than its arithmetic: torch promotes where both are 0-d."""
    wide = list(factors.unbind())
    if factors.dtype != torch.float64:
        return wide
    narrow = factors.float().unbind()
    return [w if g.dtype == torch.float64 else n for g, w, n in zip(grads, wide, narrow, strict=True)]


def _multiply(grads: list[Tensor], factors: list[Tensor]) -> None:
    """Off the CPU torch rounds a 0-d factor to a half-precision tensor's dtype: those tensors are widened first."""
    wide = [(g, f) for g, f in zip(grads, factors, strict=True) if g.dtype.itemsize > 2]
    if wide:
        torch._foreach_mul_([g for g, _ in wide], [f for _, f in wide])
    for grad, factor in zip(grads, factors, strict=True):
        if grad.dtype.itemsize == 2:
            grad.copy_(grad.float().mul_(factor))


def adamw_(
    bucket: Bucket, grads: list[Tensor], step: AdamWStep, factors: Tensor, zero_fill: bool, addresses: bytes | None
) -> None:
    """The step of ``core.adamw``, some twenty operations a param group; needs memory for copies of what it writes."""
    # Not in ``bucket.state``, which is another backend's where that has no step for these parameters.
    if not isinstance(bucket.step_state, Tensor):
        bucket.step_state = bucket.components.to(bucket.device)
    owners = bucket.step_state
    times = [t.to(bucket.device, wide_dtype(bucket.device)) + 1 for t in step.steps]
    maxima = [p if w is None else w for p, w in zip(step.params, step.max_exp_avg_sqs, strict=True)]
    tensors = (grads, step.params, step.exp_avgs, step.exp_avg_sqs, maxima)
    pieces = list(zip(*(bucket.pieces(each) for each in tensors), strict=True))
    of_pieces, each_factor = bucket.gradient_of_pieces(), factors[owners]
    are_zero = (each_factor == 0).unbind() if zero_fill else [None] * len(pieces)
    for dtype in dict.fromkeys(map(_arithmetic, pieces)):
        own_factors = each_factor.to(dtype).unbind()
        for number, rule in enumerate(step.rules):
            own = [
                (i, f, z, [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in piece])
                for i, piece, f, z in zip(of_pieces, pieces, own_factors, are_zero, strict=True)
                if step.rule_of[i] == number and _arithmetic(piece) == dtype
            ]
            if own:
                _step_alike(own, rule, times, step.skip, dtype)
    for t, time in zip(step.steps, times, strict=True):
        t.copy_(time if step.skip is None else torch.where(step.skip == 0, time, time - 1))


def _arithmetic(piece: tuple[Tensor, ...]) -> torch.dtype:
    """The real dtype that a piece is stepped in, from its gradient and parameter."""
    dtype = torch.promote_types(torch.promote_types(piece[0].dtype, piece[1].dtype), torch.float32)
    return dtype.to_real()


def _step_alike(
    own: list[tuple[int, Tensor, Tensor | None, list[Tensor]]],
    rule: AdamWRule,
    times: list[Tensor],
    skip: Tensor | None,
    dtype: torch.dtype,
) -> None:
    """Steps pieces of one param group and dtype, given as (gradient, factor, whether it erases, [g, p, m, v, w])."""
    factors, kept = [f for _, f, *_ in own], list(zip(*(piece for *_, piece in own), strict=True))
    g, p, m, v, w = ([t.to(dtype) for t in each] for each in kept)
    g = [a * f for a, f in zip(g, factors, strict=True)]
    g = [a if is_zero is None else a.masked_fill_(is_zero, 0.0) for a, (_, _, is_zero, _) in zip(g, own, strict=True)]
    if rule.maximize:
        torch._foreach_neg_(g)
    lr = rule.lr.to(g[0].device, times[0].dtype).reshape(()) if isinstance(rule.lr, Tensor) else rule.lr
    t = [times[i] for i, *_ in own]
    first = [lr / (1 - rule.beta1**n) if rule.correct_bias else torch.as_tensor(lr, dtype=n.dtype) for n in t]
    root = [(1 - rule.beta2**n).sqrt() if rule.correct_bias else torch.ones_like(n) for n in t]
    m = list(torch._foreach_lerp(m, g, 1 - rule.beta1))
    v = list(torch._foreach_mul(v, rule.beta2))
    torch._foreach_addcmul_(v, g, g, 1 - rule.beta2)
    w = list(torch._foreach_maximum(w, v)) if rule.amsgrad else v
    below = torch._foreach_sqrt(w)
    # Numbers on the CPU, where reading them is no sync: a 0-d tensor for each would take the slow path.
    on_cpu = g[0].device.type == "cpu"
    torch._foreach_div_(below, [float(r) for r in root] if on_cpu else [r.to(dtype) for r in root])
    torch._foreach_add_(below, rule.eps)
    change = torch._foreach_div(m, below)
    torch._foreach_mul_(change, [float(f) for f in first] if on_cpu else [f.to(dtype) for f in first])
    decay = 1 - lr * rule.weight_decay
    p = list(torch._foreach_mul(p, decay.to(dtype) if isinstance(decay, Tensor) else decay))
    torch._foreach_sub_(p, change)
    for tensors, values in zip(kept[1:], (p, m, v, w) if rule.amsgrad else (p, m, v), strict=False):
        if skip is not None:
            values = [torch.where(skip == 0, a.to(b.dtype), b) for a, b in zip(values, tensors, strict=True)]
        torch._foreach_copy_(tensors, values)
