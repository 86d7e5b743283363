"""AdamW's step by Triton kernels, where ``triton`` serves the gradients.

    clip_adamw_   advance_kernel, adamw_single_kernel for components of one tile; for the others power_sums_kernel,
                  coefficients_kernel, adamw_kernel
    adamw_        advance_kernel, then adamw_kernel for all

each adamw kernel for each combination of dtypes. Bytes of each float32 parameter: 28, for all elements, clipped or
not, and 4 more for the norm of a component of several tiles; no gradient is written. A component of tiles in several
gradients is one of several tiles, however small. Like ``triton``: on the current stream, no atomics, no host sync.
Copies to the device: addresses when they change, and a few hyperparameters, 72 bytes for each param group, when these
change.

CUDA graphs: addresses and hyperparameters are frozen into the graph, but a learning rate that is a tensor is not.
"""

from __future__ import annotations

import math
import struct
import weakref
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from ..core.adamw import AdamWRule, AdamWStep
from ..core.bucket import Bucket
from ..core.formula import ClipRule
from ..core.loss_scale import LossScale
from . import native, triton
from .memory import Numbers, Placed, stream_of
from .native import Addresses, packed
from .served import DTYPES
from .triton import Call, Results, addresses_on, constants_of, factors_of, kernels, launching_on, partial_sums
from .triton_tables import StepTables, StepTiles, build_step_tables

_BLOCK = 128  # gradients of a program that advances t
_HALF = (torch.bfloat16, torch.float16)


def refuses_step(bucket: Bucket, grads: list[Tensor], step: AdamWStep) -> str | None:
    """Why the kernels can't step these, or None; read off dtypes, layouts and devices."""
    state = bucket.step_state
    if isinstance(state, _State) and state.addresses_of(step) is not None:
        return None
    for i, grad in enumerate(grads):
        reason = _refusal(grad, step, i) or _refused_time(step.steps[i], step.steps[0].dtype, bucket.device)
        if reason is not None:
            return reason
    with torch.device("cpu"):  # whatever the default device is
        state = _State.of(bucket, grads, step)
    if state.addresses_of(step) is None:
        return "doesn't step parameters that share memory with others or with their states"
    bucket.step_state = state
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
    """Norms and coefficients, both [K] in ``bucket.norm_dtype``, and the step; ``grads`` aren't written.

    ``loss_scale.found_inf`` may not be ``step.skip``: some are stepped before others are measured.
    """
    results = Results.of(bucket, caps, loss_scale)
    if not grads:
        return results.norms.zero_(), results.coefs.fill_(1.0)
    with launching_on(bucket.device):
        call, factors = _advance(bucket, grads, step, addresses), results.coefs
        for tiles in call.tables.tiles:
            own = constants_of(rule) | block_of_single(call.kinds[tiles.kind])
            _launch("adamw_single_kernel", call, tiles, tiles.single, *results, **own)
        if len(call.tables.sums.components):
            partials = partial_sums(call.of_sums(), rule.norm_type)
            factors = factors_of(call.tables.sums, partials, results, rule)
        _step(call, factors, rule.zero_fill, "rest")
    return results.norms, results.coefs


def adamw_(
    bucket: Bucket, grads: list[Tensor], step: AdamWStep, factors: Tensor, zero_fill: bool, addresses: bytes | None
) -> None:
    """The step from gradients times ``factors`` [K]; ``grads`` aren't written."""
    if not grads:
        return
    with launching_on(bucket.device):
        _step(_advance(bucket, grads, step, addresses), factors.contiguous(), zero_fill, "rows")


class _StepCall(NamedTuple):
    """What the kernels need of one step, on the device."""

    kinds: list[Kind]
    tables: StepTables
    addresses: Tensor  # of the gradients' first elements, int64 [n]
    states: Tensor  # the table of addresses of all that is written
    length: int  # number of gradients
    scalars: Tensor  # what ``advance_kernel`` has written
    skip: Tensor | None

    def of_sums(self) -> Call:
        """The same for what ``triton`` measures of it."""
        return Call(self.tables.sums, self.addresses)


def _advance(bucket: Bucket, grads: list[Tensor], step: AdamWStep, addresses: bytes | None) -> _StepCall:
    """Everything before any element is touched: checks, tables, and t."""
    device, stream, count = bucket.device, stream_of(bucket.device), len(grads)
    reason = refuses_step(bucket, grads, step)
    if reason is not None:
        raise RuntimeError(f"backend='triton' {reason}")
    state: _State = bucket.step_state
    found = state.addresses_of(step)
    state.last = None
    assert found is not None  # since there was no reason against
    tables = state.tables.on(device, stream)
    pointers = addresses_on(bucket, grads, addresses, stream)
    states = state.addresses.on(device, found, stream)
    rule_of = state.rule_of.on(device, state.packed_rule_of(step.rule_of), stream)
    lrs = [_learning_rate(rule.lr, device) for rule in step.rules]  # to be kept until the kernel is launched
    numbers = b"".join(map(_packed_rule, step.rules, lrs))
    rules = state.rules.on(device, numbers, stream).view(torch.float64)
    scalars = torch.empty((count, 8), dtype=torch.float64, device=device)
    kernels().advance_kernel[(-(-count // _BLOCK),)](
        *(states, count, rule_of, rules, step.skip, scalars),
        TIME=triton.type_of(step.steps[0].dtype),
        BLOCK=_BLOCK,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return _StepCall(state.kinds, tables, pointers, states, count, scalars, step.skip)


def _step(call: _StepCall, factors: Tensor, zero_fill: bool, which: Literal["rows", "rest"]) -> None:
    """Launches the step of these tiles."""
    for tiles in call.tables.tiles:
        own = block(call.kinds[tiles.kind])
        _launch("adamw_kernel", call, tiles, getattr(tiles, which), factors, ZERO_FILL=zero_fill, **own)


def _launch(
    kernel: str, call: _StepCall, tiles: StepTiles, rows: Tensor, *arguments: object, **constants: object
) -> None:
    """One program for each of these rows."""
    if len(rows):
        getattr(kernels(), kernel)[(len(rows),)](
            *(call.addresses, rows, call.tables.sums.layouts, *arguments),
            *(call.states, call.length, call.scalars, call.skip),
            DIMS=tiles.dims,
            **constants,
            **triton.options(),
        )


class Kind(NamedTuple):
    """What the elements of one launch have in common."""

    grad: torch.dtype
    param: torch.dtype
    state: torch.dtype
    amsgrad: bool


@cache
def block(kind: Kind) -> dict[str, Any]:
    """The launch configuration. A thread has the same elements of all tensors, 16 bytes of them in the widest type.

    With 16 bytes of narrower types, stores of the widest would have to exchange elements between threads.
    """
    widest = max(dtype.itemsize for dtype in kind[:3])
    return {
        "GRAD": triton.type_of(kind.grad),
        "PARAM": triton.type_of(kind.param),
        "STATE": triton.type_of(kind.state),
        "AMSGRAD": kind.amsgrad,
        "COLUMNS": triton.THREADS * 16 // widest,
        "LANES": triton.THREADS,
    }


@cache
def block_of_single(kind: Kind) -> dict[str, Any]:
    """The same of a launch that measures too: as ``triton`` does, so that norms get the same bits."""
    return block(kind) | {"ROWS": triton.ROWS}


# -------------------------------------------------------------------------------------------------------
# What a bucket keeps from step to step
# -------------------------------------------------------------------------------------------------------


@dataclass
class _State:
    """Tables of one bucket's parameters and their states, and which tensors they were made for."""

    kinds: list[Kind]
    tables: Placed[StepTables]
    native: Addresses | None  # compares tensors with those; None without the compiled extension, or for subclasses
    forms: object  # the same in Python
    addresses: Numbers = field(default_factory=Numbers)
    rules: Numbers = field(default_factory=Numbers)
    rule_of: Numbers = field(default_factory=Numbers)
    last_rule_of: tuple[tuple[int, ...], bytes] = ((), b"")
    last: tuple[weakref.ref[AdamWStep], bytes | None] | None = None  # a step is checked, then done

    @classmethod
    def of(cls, bucket: Bucket, grads: list[Tensor], step: AdamWStep) -> _State:
        """Of parameters that aren't refused."""
        each = [
            Kind(g.dtype, p.dtype, m.dtype, w is not None)
            for g, p, m, w in zip(grads, step.params, step.exp_avgs, step.max_exp_avg_sqs, strict=True)
        ]
        kinds = list(dict.fromkeys(each))
        column, end = [], 4 * len(grads)  # of w in the table of addresses
        for kind in each:
            column.append(end if kind.amsgrad else 0)
            end += kind.amsgrad
        tables = Placed(build_step_tables(bucket, grads, [kinds.index(kind) for kind in each], column))
        tensors = _tensors(step)
        known = None
        if native.unavailable() is None and all(type(t) in (Tensor, Parameter) for t in tensors if t is not None):
            known = Addresses(tensors)
        return cls(kinds, tables, known, None if known else _forms(tensors))

    def addresses_of(self, step: AdamWStep) -> bytes | None:
        """Of ``_tensors``; None if these differ from those that this was made for, or share memory."""
        if self.last is not None and self.last[0]() is step:
            return self.last[1]
        tensors = _tensors(step)
        if self.native is not None:
            found = self.native.of(tensors, writes=True)
        else:
            alike = _forms(tensors) == self.forms
            found = packed(t.data_ptr() for t in tensors if t is not None) if alike else None
        self.last = weakref.ref(step), found
        return found

    def packed_rule_of(self, rule_of: tuple[int, ...]) -> bytes:
        """As bytes, the same object while it stays the same."""
        if self.last_rule_of[0] != rule_of:
            self.last_rule_of = rule_of, packed(rule_of)
        return self.last_rule_of[1]


def _tensors(step: AdamWStep) -> list[Tensor | None]:
    """What the step writes, in the order of the kernels' table of addresses, in which None has no place."""
    return [*step.params, *step.exp_avgs, *step.exp_avg_sqs, *step.steps, *step.max_exp_avg_sqs]


def _forms(tensors: list[Tensor | None]) -> list[object]:
    return [None if t is None else (t.dtype, t.device, t.shape, t.stride()) for t in tensors]


# -------------------------------------------------------------------------------------------------------
# Hyperparameters
# -------------------------------------------------------------------------------------------------------


def _learning_rate(lr: float | Tensor, device: torch.device) -> float | Tensor:
    """As kernels take it: a number, or a float32 or float64 tensor on the device."""
    if not isinstance(lr, Tensor):
        return lr
    if lr.device.type == "cpu" and device.type != "cpu":
        return float(lr)  # no host sync, as reading a device's would be
    return lr if lr.device == device and lr.dtype in (torch.float32, torch.float64) else lr.to(device, torch.float64)


def _packed_rule(rule: AdamWRule, lr: float | Tensor) -> bytes:
    """The row of a rule in the table that ``advance_kernel`` reads."""
    first = struct.pack("q", lr.data_ptr()) if isinstance(lr, Tensor) else struct.pack("d", lr)
    beta1, beta2 = rule.beta1, rule.beta2
    logs = [math.log(b) if rule.correct_bias and b > 0 else -math.inf for b in (beta1, beta2)]
    sign, kind = -1.0 if rule.maximize else 1.0, lr.dtype.itemsize if isinstance(lr, Tensor) else 0
    return first + struct.pack("8d", *logs, beta1, beta2, rule.eps, rule.weight_decay, sign, kind)


# -------------------------------------------------------------------------------------------------------
# What is refused
# -------------------------------------------------------------------------------------------------------


def _refusal(grad: Tensor, step: AdamWStep, i: int) -> str | None:
    """Why the kernels can't step the parameter of this gradient, or None."""
    param, states = step.params[i], [step.exp_avgs[i], step.exp_avg_sqs[i]]
    w = step.max_exp_avg_sqs[i]
    states += [] if w is None else [w]
    if param.dtype not in DTYPES:
        return f"doesn't step {param.dtype} parameters"
    wider = {param.dtype, torch.float32} if param.dtype in _HALF else {param.dtype}
    if grad.dtype not in wider:
        return f"doesn't step {param.dtype} parameters from {grad.dtype} gradients"
    kinds = {state.dtype for state in states}
    if len(kinds) > 1 or not kinds <= wider:
        names = ", ".join(sorted(map(str, kinds)))
        return f"doesn't step {param.dtype} parameters with running means of {names}"
    for tensor in (param, *states):
        if tensor.device != grad.device:
            return f"doesn't step parameters on {grad.device} with parameters or running means on {tensor.device}"
        if not _lie_alike(tensor, grad):
            return (
                "doesn't step parameters whose memory layout differs from their gradients' or running means' (shape "
                f"{list(grad.shape)}, strides {list(tensor.stride())} and {list(grad.stride())})"
            )
    return None


def _refused_time(time: Tensor, dtype: torch.dtype, device: torch.device) -> str | None:
    """The same for its number of steps; all are of one dtype."""
    if time.device != device:
        return f"doesn't step parameters on {device} with 'step' on {time.device}"
    if time.dtype != dtype or dtype not in (torch.float32, torch.float64):
        return f"doesn't step parameters with 'step' of {', '.join(sorted({str(time.dtype), str(dtype)}))}"
    return None if time.numel() == 1 else f"doesn't step parameters with 'step' of shape {list(time.shape)}"


def _lie_alike(a: Tensor, b: Tensor) -> bool:
    """Whether equal indices are equal offsets in memory."""
    if a.shape != b.shape:
        return False
    return not a.numel() or all(n == 1 or s == t for n, s, t in zip(a.shape, a.stride(), b.stride(), strict=True))
