"""The fused CPU kernels, csrc/cpu/: a program for each bucket, made once, and addresses at every call."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from ..core.adamw import AdamWRule, AdamWStep
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
Result = TypeVar("Result")


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
    norms, coefs = bucket.results()
    arguments = native.clip_arguments(rule, caps, loss_scale, norms, coefs)
    _call("clip_", native._C.cpu_clip, bucket, grads, addresses, *arguments)
    return norms, coefs


def clip_at_once_(
    bucket: Bucket, parameters: tuple[Tensor, ...], caps: Tensor, rule: ClipRule, loss_scale: LossScale
) -> tuple[Tensor, Tensor] | None:
    """The same from parameters, whose gradients native code reads; None, and nothing done, if they are others."""
    state: _State | None = bucket.state
    if state is None or bucket.addresses is None:
        return None
    planned, results = bucket.addresses, bucket.results()
    arguments = native.arguments_at_once(planned, parameters, caps, rule, loss_scale, results)
    found = _in_profile("clip_", native._C.cpu_clip_at_once, state.program, *arguments)
    if found is None:
        return None
    planned.last[True] = found
    return results


def refuses_step(bucket: Bucket, grads: list[Tensor], step: AdamWStep) -> str | None:
    """Why it can't step these parameters, or None. Reads the addresses of all that is written."""
    written, state = step.written(), bucket.step_state
    if isinstance(state, _StepState) and state.rule_of == step.rule_of:
        step.addresses = state.addresses.of(written, writes=True)
    if step.addresses is None:
        try:
            addresses = Addresses([*written])
            program = look_up(bucket, grads, None, _make, False)[0]
            rule_of = native.packed(step.rule_of)
            own = native._C.cpu_step_program(
                program.program, program.addresses.signature, addresses.signature, rule_of
            )
        except (TypeError, RuntimeError) as error:
            return str(error)
        bucket.step_state = _StepState(addresses, own, step.rule_of)
        step.addresses = addresses.of(written, writes=True)
        if step.addresses is None:
            return "can't step parameters or states that share memory"
    return None


def clip_adamw_(
    bucket: Bucket,
    grads: list[Tensor],
    step: AdamWStep,
    caps: Tensor,
    rule: ClipRule,
    loss_scale: LossScale,
    addresses: bytes | None,
) -> tuple[Tensor, Tensor]:
    """Norms and coefficients, [K] in ``bucket.norm_dtype``; a component is stepped while its gradient is in cache."""
    norms, coefs = bucket.results()
    arguments = (*_step_arguments(bucket, step), *native.clip_arguments(rule, caps, loss_scale, norms, coefs))
    _call("clip_adamw_", native._C.cpu_clip_adamw, bucket, grads, addresses, *arguments)
    return norms, coefs


def adamw_(
    bucket: Bucket, grads: list[Tensor], step: AdamWStep, factors: Tensor, zero_fill: bool, addresses: bytes | None
) -> None:
    """One step of each parameter with its gradient times its component's factor."""
    factors = factors.double().contiguous()
    own = _step_arguments(bucket, step)
    _call("adamw_", native._C.cpu_adamw, bucket, grads, addresses, *own, factors.data_ptr(), zero_fill)


@dataclass
class _StepState:
    """What is kept for an optimizer's steps of a bucket."""

    addresses: Addresses  # of all that a step writes
    program: _C.CpuStepProgram
    rule_of: tuple[int, ...]


def _step_arguments(bucket: Bucket, step: AdamWStep) -> tuple[_C.CpuStepProgram, bytes, bytes, int]:
    """What the native functions take after the gradients' addresses."""
    assert step.addresses is not None  # by refuses_step
    rules = b"".join(map(_packed_rule, step.rules))
    return bucket.step_state.program, step.addresses, rules, 0 if step.skip is None else step.skip.data_ptr()


def _packed_rule(rule: AdamWRule) -> bytes:
    numbers = float(rule.lr), rule.beta1, rule.beta2, rule.eps, rule.weight_decay, rule.maximize, rule.correct_bias
    return struct.pack("7d", *numbers)


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
    """Calls a native function for a bucket."""
    state: _State | None = bucket.state
    if state is None or addresses is None:
        state, addresses = look_up(bucket, grads, addresses, _make, name != "power_sums")
    _in_profile(name, function, state.program, addresses, *arguments)


def _in_profile(name: str, function: Callable[[Unpack[Arguments]], Result], *arguments: Unpack[Arguments]) -> Result:
    """Calls a native function. A profile shows it as a range, since it is no operator of torch."""
    if not torch._C._autograd._profiler_enabled():
        return function(*arguments)
    with torch.profiler.record_function(f"cwclip_kernels::{name}"):
        return function(*arguments)


def _make(bucket: Bucket, addresses: Addresses) -> _State:
    return _State(addresses, native._C.cpu_program(*program_arguments(bucket, addresses)))
