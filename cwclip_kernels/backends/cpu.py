"""The fused CPU kernels, csrc/cpu/: a program for each bucket, made once, and addresses at every call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..core.bucket import Bucket
from ..core.formula import ClipRule
from ..core.loss_scale import LossScale
from . import native
from .native import Addresses
from .programs import ProgramState, look_up, program_arguments
from .served import unserved

if TYPE_CHECKING:
    from typing_extensions import TypeVarTuple, Unpack

    from .. import _C

    Arguments = TypeVarTuple("Arguments")


def refuses(device: torch.device, dtype: torch.dtype, norm_type: float) -> str | None:
    """Why this backend can't serve such a gradient, or None."""
    if device.type != "cpu":
        return f"serves CPU tensors, not {device.type}"
    return unserved(dtype, norm_type) or native.unavailable()


def power_sums(bucket: Bucket, grads: list[Tensor], norm_type: float, addresses: bytes | None) -> Tensor:
    """sum |g|^p of each component, or max |g|: float64 [K]."""
    sums = torch.empty(bucket.count, dtype=torch.float64, device=bucket.device)
    _call("power_sums", native._C.cpu_power_sums, bucket, grads, addresses, norm_type, sums.data_ptr())
    return sums


def scale_(bucket: Bucket, grads: list[Tensor], coefs: Tensor, zero_fill: bool, addresses: bytes | None) -> None:
    """g <- coef * g in place; nothing written where coef is 1."""
    factors = coefs.double().contiguous()
    _call("scale_", native._C.cpu_scale, bucket, grads, addresses, factors.data_ptr(), zero_fill)


def clip_(
    bucket: Bucket, grads: list[Tensor], caps: Tensor, rule: ClipRule, loss_scale: LossScale, addresses: bytes | None
) -> tuple[Tensor, Tensor]:
    """Norms and coefficients, [K] in ``bucket.norm_dtype``; each component is scaled while it is in cache."""
    norms = torch.empty(bucket.count, dtype=bucket.norm_dtype, device=bucket.device)
    coefs = torch.empty_like(norms)
    arguments = native.clip_arguments(rule, caps, loss_scale, norms, coefs)
    _call("clip_", native._C.cpu_clip, bucket, grads, addresses, *arguments)
    return norms, coefs


@dataclass
class _State(ProgramState):
    program: _C.CpuProgram


def _call(
    name: str,
    function: Callable[[_C.CpuProgram, bytes, Unpack[Arguments]], None],
    bucket: Bucket,
    grads: list[Tensor],
    addresses: bytes | None,
    *arguments: Unpack[Arguments],
) -> None:
    """Calls a native function for a bucket. A profile shows it as a range, since it is no operator of torch."""
    state: _State | None = bucket.state
    if state is None or addresses is None:
        state, addresses = look_up(bucket, grads, addresses, _make, name != "power_sums")
    if not torch._C._autograd._profiler_enabled():
        function(state.program, addresses, *arguments)
        return
    with torch.profiler.record_function(f"cwclip_kernels::{name}"):
        function(state.program, addresses, *arguments)


def _make(bucket: Bucket, addresses: Addresses) -> _State:
    return _State(addresses, native._C.cpu_program(*program_arguments(bucket, addresses)))
