"""The CUDA kernels, csrc/cuda/: one launch or two for each 4,048 gradients, addresses in their parameters, no sync.

An optimizer's step takes three: norms, what follows from each t, and the update.

Static tables lie on the device from the first call on.

CUDA graphs: call once before capturing. Addresses are frozen into the graph, caps are read at every replay.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..core.adamw import AdamWStep
from ..core.bucket import Bucket
from ..core.formula import ClipRule
from ..core.loss_scale import LossScale
from . import native
from .cuda_step import refuses_step as refuses_step
from .cuda_step import step_arguments
from .memory import BEFORE_CAPTURE, OnDevice, keep_for_graphs
from .native import Addresses
from .programs import ProgramState, look_up, program_arguments
from .served import unserved

if TYPE_CHECKING:
    from typing_extensions import TypeVarTuple, Unpack

    from .. import _C

    Arguments = TypeVarTuple("Arguments")


def refuses(device: torch.device, dtype: torch.dtype, norm_type: float) -> str | None:
    """Why this backend can't serve such a gradient, or None."""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"serves NVIDIA GPUs, not {'AMD GPUs' if device.type == 'cuda' else device.type}"
    return unserved(dtype, norm_type) or unavailable(device)


@cache
def unavailable(device: torch.device) -> str | None:
    """Why the kernels can't run on this device and what to do about it, or None."""
    if reason := native.unavailable():
        return reason
    if not hasattr(native._C, "cuda_clip"):
        return (
            "was left out when the compiled extension was built; reinstall with nvcc on the PATH: "
            "CWCLIP_BUILD=cuda pip install --no-build-isolation --force-reinstall --no-deps cwclip_kernels"
        )
    with torch.cuda.device(device):
        reason = native._C.cuda_obstacle(device.index or 0)
    return f"can't run on {torch.cuda.get_device_name(device)}: {reason}" if reason else None


def power_sums(bucket: Bucket, grads: list[Tensor], norm_type: float, addresses: bytes | None) -> Tensor:
    """sum |g|^p of each component, or max |g|: float64 [K]."""
    sums = torch.empty(bucket.count, dtype=torch.float64, device=bucket.device)
    _launch(native._C.cuda_power_sums, bucket, grads, addresses, False, (), norm_type, sums.data_ptr())
    return sums


def scale_(bucket: Bucket, grads: list[Tensor], coefs: Tensor, zero_fill: bool, addresses: bytes | None) -> None:
    """g <- coef * g in place; nothing written where coef is 1."""
    coefs = coefs.contiguous()
    is_wide = coefs.dtype == torch.float64
    _launch(native._C.cuda_scale, bucket, grads, addresses, True, (), coefs.data_ptr(), is_wide, zero_fill)


def clip_(
    bucket: Bucket, grads: list[Tensor], caps: Tensor, rule: ClipRule, loss_scale: LossScale, addresses: bytes | None
) -> tuple[Tensor, Tensor]:
    """Norms and coefficients, both [K] in ``bucket.norm_dtype``, after scaling ``grads`` in place."""
    norms, coefs = bucket.results()
    arguments = native.clip_arguments(rule, caps, loss_scale, norms, coefs)
    _launch(native._C.cuda_clip, bucket, grads, addresses, True, (caps, loss_scale), *arguments)
    return norms, coefs


def clip_at_once_(
    bucket: Bucket, parameters: tuple[Tensor, ...], caps: Tensor, rule: ClipRule, loss_scale: LossScale
) -> tuple[Tensor, Tensor] | None:
    """The same from parameters, whose gradients native code reads.

    None, and nothing done, if these are others, on another device than the current one, in a call that is captured or
    the first on its stream.
    """
    state: _State | None = bucket.state
    if state is None or bucket.addresses is None or not _is_current(bucket.device):
        return None
    planned, results = bucket.addresses, bucket.results()
    arguments = native.arguments_at_once(planned, parameters, caps, rule, loss_scale, results)
    try:
        found = native._C.cuda_clip_at_once(state.program, state.workspaces, *arguments)
    except RuntimeError:
        state.workspaces.clear()  # a part of the call may have been launched, and not left zeros
        raise
    if found is None:
        return None
    planned.last[True] = found
    return results


def clip_adamw_(
    bucket: Bucket,
    grads: list[Tensor],
    step: AdamWStep,
    caps: Tensor,
    rule: ClipRule,
    loss_scale: LossScale,
    addresses: bytes | None,
) -> tuple[Tensor, Tensor]:
    """Norms and coefficients, both [K] in ``bucket.norm_dtype``, and the step of ``core.adamw`` by them."""
    norms, coefs = bucket.results()
    arguments = native.clip_arguments(rule, caps, loss_scale, norms, coefs)
    _launch_step(native._C.cuda_clip_adamw, bucket, grads, step, addresses, (caps, loss_scale), *arguments)
    return norms, coefs


def adamw_(
    bucket: Bucket, grads: list[Tensor], step: AdamWStep, factors: Tensor, zero_fill: bool, addresses: bytes | None
) -> None:
    """The step of ``core.adamw`` by given factors [K]."""
    factors = factors.contiguous()
    arguments = factors.data_ptr(), factors.dtype == torch.float64, zero_fill
    _launch_step(native._C.cuda_adamw, bucket, grads, step, addresses, (), *arguments)


@dataclass
class _State(ProgramState):
    program: _C.CudaProgram
    tables: OnDevice  # uint8
    workspace_bytes: int
    # By the number of a stream, whose calls come one after another. Not by its handle: a later stream may get that of
    # one that is gone, while what was launched there still runs.
    workspaces: dict[int, Tensor] = field(default_factory=dict)


def _launch(
    function: Callable[[_C.CudaProgram, bytes, int, int, Unpack[Arguments]], None],
    bucket: Bucket,
    grads: list[Tensor],
    addresses: bytes | None,
    writes: bool,
    read: tuple[object, ...],
    *arguments: Unpack[Arguments],
) -> None:
    """Calls a native function on the current stream. ``read``: what a captured graph goes on reading."""
    with _on(bucket.device):
        stream, number, capturing = native._C.cuda_stream(bucket.device.index or 0)
        state, places = look_up(bucket, grads, addresses, partial(_make_state, capturing), writes)
        if capturing:
            # Of the graph's own, since it may run beside calls outside of it, and zeroed at every replay.
            workspace = torch.zeros(state.workspace_bytes, dtype=torch.uint8, device=bucket.device)
            keep_for_graphs(state.tables.tensor, *read)
        else:
            found = state.workspaces.get(number)
            workspace = _new_workspace(state, number, bucket.device) if found is None else found
        try:
            function(state.program, places, stream, workspace.data_ptr(), *arguments)
        except RuntimeError:
            state.workspaces.pop(number, None)  # a part of the call may have been launched, and not left zeros
            raise


def _launch_step(
    function: Callable[[_C.CudaProgram, bytes, int, int, int, bytes, int, Unpack[Arguments]], None],
    bucket: Bucket,
    grads: list[Tensor],
    step: AdamWStep,
    addresses: bytes | None,
    read: tuple[object, ...],
    *arguments: Unpack[Arguments],
) -> None:
    """The same for a step."""

    def launch(program: _C.CudaProgram, places: bytes, stream: int, workspace: int, *own: Unpack[Arguments]) -> None:
        _, number, capturing = native._C.cuda_stream(bucket.device.index or 0)
        first, _alive = step_arguments(program, bucket, step, number, capturing)
        function(program, places, stream, workspace, *first, *own)

    _launch(launch, bucket, grads, addresses, False, read, *arguments)


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Makes it the current device, which costs something, if it isn't."""
    return nullcontext() if _is_current(device) else torch.cuda.device(device)


def _is_current(device: torch.device) -> bool:
    return device.type != "cuda" or device.index == torch.cuda.current_device()


def _new_workspace(state: _State, number: int, device: torch.device) -> Tensor:
    """Zeros, for the current stream, which has this number, and from here on also sees the tables."""
    state.tables.wait(number)
    state.workspaces[number] = torch.zeros(state.workspace_bytes, dtype=torch.uint8, device=device)
    return state.workspaces[number]


def _make_state(capturing: bool, bucket: Bucket, addresses: Addresses) -> _State:
    if capturing:
        raise RuntimeError(BEFORE_CAPTURE)
    program, on_host, workspace_bytes = native._C.cuda_program(*program_arguments(bucket, addresses))
    tables = OnDevice(torch.frombuffer(bytearray(on_host), dtype=torch.uint8), bucket.device)
    native._C.cuda_place(program, tables.tensor.data_ptr(), bucket.device.index or 0)
    return _State(addresses, program, tables, workspace_bytes)
