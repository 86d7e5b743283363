"""The fused CPU kernels, csrc/cpu/. Pieces and tiles are worked out once a bucket; a call hands over addresses."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.bucket import Bucket
from ..core.formula import ClipRule
from ..core.loss_scale import UNSCALED, LossScale
from . import native
from .native import Addresses


def refuses(device: torch.device, dtype: torch.dtype, norm_type: float) -> str | None:
    """Why this backend can't serve such a gradient, or None."""
    if device.type != "cpu":
        return f"serves CPU tensors, not {device.type}"
    return native.unserved(dtype, norm_type) or native.unavailable()


def power_sums(bucket: Bucket, grads: list[Tensor], norm_type: float, addresses: bytes | None = None) -> Tensor:
    """sum |g|^p of each component, or max |g|: float64 [K]."""
    program, places = _look_up(bucket, grads, addresses, writes=False)
    sums = torch.empty(bucket.count, dtype=torch.float64, device="cpu")
    _call("power_sums", _C().cpu_power_sums, program, places, norm_type, sums.data_ptr())
    return sums


def scale_(
    bucket: Bucket, grads: list[Tensor], coefs: Tensor, zero_fill: bool, addresses: bytes | None = None
) -> None:
    """g <- coef * g in place; nothing written where coef is 1."""
    program, places = _look_up(bucket, grads, addresses, writes=True)
    factors = coefs.double().contiguous()
    _call("scale_", _C().cpu_scale, program, places, factors.data_ptr(), zero_fill)


def clip_(
    bucket: Bucket,
    grads: list[Tensor],
    caps: Tensor,
    rule: ClipRule,
    loss_scale: LossScale = UNSCALED,
    addresses: bytes | None = None,
) -> tuple[Tensor, Tensor]:
    """Norms and coefficients, [K], float64 if any gradient is; each component scaled while still in cache."""
    program, places = _look_up(bucket, grads, addresses, writes=True)
    norms = torch.empty(bucket.count, dtype=bucket.norm_dtype, device="cpu")
    coefs = torch.empty(bucket.count, dtype=bucket.norm_dtype, device="cpu")
    inverse, found_inf = loss_scale.inverse, loss_scale.found_inf
    _call(
        "clip_",
        _C().cpu_clip,
        program,
        places,
        rule.norm_type,
        rule.eps,
        native.POLICY_CODES[rule.nonfinite],
        bucket.norm_dtype == torch.float64,
        caps.data_ptr(),
        caps.ndim,
        0 if inverse is None else inverse.data_ptr(),
        0 if found_inf is None else found_inf.data_ptr(),
        norms.data_ptr(),
        coefs.data_ptr(),
    )
    return norms, coefs


@dataclass(frozen=True)
class _State:
    """What a bucket keeps from call to call.

    Attributes:
        addresses: of its gradients.
        program: a capsule of csrc/cpu/calls.h.
    """

    addresses: Addresses
    program: Any


def _look_up(bucket: Bucket, grads: list[Tensor], addresses: bytes | None, *, writes: bool) -> tuple[Any, bytes]:
    """The bucket's program, and where its gradients lie.

    Raises:
        RuntimeError: they share memory, or these are not the gradients that the bucket was made for.
    """
    state, places = native.look_up(bucket, grads, addresses, _make, writes=writes)
    return state.program, places


def _make(bucket: Bucket, addresses: Addresses) -> _State:
    cuts = bucket.cuts()
    components = native.bytes_of(bucket.components)
    packed = None if cuts is None else native.packed(cuts)
    return _State(addresses, _C().cpu_program(addresses.layout, components, packed, bucket.count))


def _C() -> Any:
    return sys.modules["cwclip_kernels._C"]


def _call(name: str, function: Callable[..., None], *arguments: object) -> None:
    """The call itself, with a range of its own where a profiler is at work: it is no operator of torch's."""
    if not torch._C._autograd._profiler_enabled():
        function(*arguments)
        return
    with torch.profiler.record_function(f"cwclip_kernels::{name}"):
        function(*arguments)
