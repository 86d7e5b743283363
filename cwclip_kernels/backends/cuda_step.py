"""What the CUDA backend keeps for an optimizer's steps of a bucket, and what it can't step.

Parameters and states lie where they were at the step before, almost always: a table on the device has their
addresses, which every call compares with the tensors' in one native pass. Where any has moved the table is made anew.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..core.adamw import AdamWRule, AdamWStep
from ..core.bucket import Bucket
from . import native
from .memory import BEFORE_CAPTURE, OnDevice, keep_for_graphs
from .native import Addresses

if TYPE_CHECKING:
    from .. import _C

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}  # DType of csrc/common/types.h
_HALF = (torch.bfloat16, torch.float16)
_RULE = struct.Struct("5dQ4i")  # AdamWRule of csrc/cuda/step.h


def refuses_step(bucket: Bucket, grads: list[Tensor], step: AdamWStep) -> str | None:
    """See ``core.adamw.FusedStepBackend``. Reads the addresses of all that is written."""
    written, state = step.written(), bucket.step_state
    if isinstance(state, StepState):
        step.addresses = state.addresses.of(written, writes=True)
        if step.addresses is not None:  # and the tensors look as those that were looked at before
            return None
    for parts in zip(grads, step.params, step.exp_avgs, step.exp_avg_sqs, step.max_exp_avg_sqs, strict=True):
        reason = _refusal(bucket.device, *parts)
        if reason is not None:
            return reason
    for t in step.steps:
        if t.device != bucket.device or t.numel() != 1 or t.dtype not in (torch.float32, torch.float64):
            found = f"{t.dtype} {list(t.shape)} on {t.device}"
            return f"takes step counts that are one float32 or float64 on {bucket.device}, not {found}"
    try:
        state = StepState(Addresses(written))
    except TypeError:
        return "steps plain tensors, not subclasses of Tensor"
    step.addresses = state.addresses.of(written, writes=True)
    if step.addresses is None:
        return "doesn't step parameters, states and step counts that share memory"
    bucket.step_state = state
    return None


def _refusal(device: torch.device, g: Tensor, p: Tensor, m: Tensor, v: Tensor, w: Tensor | None) -> str | None:
    """Why one gradient's tensors can't be stepped."""
    states = [m, v] if w is None else [m, v, w]
    dtypes = (p.dtype, torch.float32) if p.dtype in _HALF else (p.dtype,)
    if (
        p.dtype not in _DTYPES
        or g.dtype not in dtypes
        or any(t.dtype != m.dtype for t in states)
        or m.dtype not in dtypes
    ):
        kept = ", ".join(dict.fromkeys(str(t.dtype) for t in states))
        return f"doesn't step {p.dtype} parameters with {g.dtype} gradients and {kept} states"
    for t in (p, *states):
        if t.device != device:
            return f"steps parameters and states on {device}, where their gradients are, not on {t.device}"
        if t.shape != g.shape or (t.numel() and _steps_of(t) != _steps_of(g)):
            return "steps parameters and states of their gradients' shapes and strides only"
    return None


def _steps_of(tensor: Tensor) -> list[int]:
    """The strides that matter."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


@dataclass(eq=False)
class StepState:
    """What is kept with a bucket.

    Attributes:
        addresses: of all tensors that a step writes.
    """

    addresses: Addresses
    _table: OnDevice | None = None
    _made_for: tuple[bytes | None, tuple[int, ...], _C.CudaProgram] | None = None

    def table(
        self, program: _C.CudaProgram, step: AdamWStep, device: torch.device, number: int, capturing: bool
    ) -> Tensor:
        """The table of addresses, for kernels on the current stream, which has this number; uploaded if it moved."""
        made_for = step.addresses, step.rule_of, program
        if self._made_for != made_for:
            if capturing:
                raise RuntimeError(BEFORE_CAPTURE if self._table is None else _MOVED)
            on_host = native._C.cuda_step_table(program, _stepped(step))
            self._table = OnDevice(torch.frombuffer(bytearray(on_host), dtype=torch.uint8), device)
            self._made_for = made_for
        assert self._table is not None
        if not capturing:  # a graph is replayed later, and can't wait for what is outside of it
            self._table.wait(number)
        return self._table.tensor


_MOVED = (
    "parameters or optimizer states have moved, or changed their param group, since the last step, and a CUDA graph "
    "is being captured: make a step before, so that tables are on the device"
)


def step_arguments(
    program: _C.CudaProgram, bucket: Bucket, step: AdamWStep, number: int, capturing: bool
) -> tuple[tuple[int, bytes, int], object]:
    """``table``, ``rules`` and ``skip`` of ``cuda_adamw``; and what must live until that is called.

    ``number`` is the current stream's.
    """
    table = bucket.step_state.table(program, step, bucket.device, number, capturing)
    rates = [_rate(rule, bucket.device) for rule in step.rules]
    rules = b"".join(map(_packed, step.rules, rates))
    if capturing:
        keep_for_graphs(table, step.skip, rates)
    return (table.data_ptr(), rules, 0 if step.skip is None else step.skip.data_ptr()), rates


def _rate(rule: AdamWRule, device: torch.device) -> Tensor | None:
    """A learning rate on the device as kernels read it."""
    lr = rule.lr
    if not isinstance(lr, Tensor):
        return None
    return lr if lr.device == device and lr.dtype in (torch.float32, torch.float64) else lr.to(device, torch.float64)


def _packed(rule: AdamWRule, rate: Tensor | None) -> bytes:
    number = 0.0 if isinstance(rule.lr, Tensor) else rule.lr
    at, is_double = (0, False) if rate is None else (rate.data_ptr(), rate.dtype == torch.float64)
    numbers = number, rule.beta1, rule.beta2, rule.eps, rule.weight_decay
    return _RULE.pack(*numbers, at, is_double, rule.maximize, rule.correct_bias, 0)


def _stepped(step: AdamWStep) -> bytes:
    """What ``cuda_step_table`` takes."""
    numbers: list[int] = []
    lists = step.params, step.exp_avgs, step.exp_avg_sqs, step.max_exp_avg_sqs, step.steps, step.rule_of
    for p, m, v, w, t, rule in zip(*lists, strict=True):
        numbers += [0 if tensor is None else tensor.data_ptr() for tensor in (p, m, v, w, t)]
        numbers += [rule, _DTYPES[p.dtype], _DTYPES[m.dtype], t.dtype == torch.float64]
    return native.packed(numbers)
