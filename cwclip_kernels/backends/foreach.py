"""torch._foreach operations: works wherever torch does, and needs nothing compiled.

Reads every gradient once for its norm, then reads and writes every gradient, clipped or not (3N bytes).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

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
    factors = _factors(grads, coefs[_state(bucket)[1]])
    if bucket.device.type == "cpu":
        torch._foreach_mul_(grads, factors)
    else:
        _multiply(grads, factors)
    if zero_fill:
        for grad, factor in zip(grads, factors, strict=True):
            grad.masked_fill_(factor == 0, 0.0)


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
