"""The CUDA kernels, csrc/cuda/: at most two launches a call, addresses in the kernel's own parameters, no sync.

Static tables lie on the device from the first call on. At every call the gradients' addresses are read from the
tensors, together with all that the tables depend on, so that a plan needn't compare it too.

CUDA graphs: call once before capturing. Addresses are frozen into the graph, caps are read at every replay.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache, partial

import torch
from torch import Tensor

from ..core.bucket import Bucket
from ..core.formula import ClipRule
from ..core.loss_scale import UNSCALED, LossScale
from . import native
from .memory import BEFORE_CAPTURE, keep_for_graphs, upload

_POWER_SUMS, _SCALE, _CLIP = range(3)  # csrc/cuda/launch.h: Kind


def refuses(device: torch.device, dtype: torch.dtype, norm_type: float) -> str | None:
    """Why this backend can't serve such a gradient, or None."""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"serves NVIDIA GPUs, not {'AMD GPUs' if device.type == 'cuda' else device.type}"
    return native.unserved(dtype, norm_type) or unavailable(device)


@cache
def unavailable(device: torch.device) -> str | None:
    """Why the kernels can't run on this device and what to do about it, or None."""
    if reason := native.unavailable():
        return reason
    extension = native.module()
    if not hasattr(extension, "cuda_enqueue"):
        return (
            "was left out when the compiled extension was built; reinstall with nvcc on the PATH: "
            "CWCLIP_BUILD=cuda pip install --no-build-isolation --force-reinstall --no-deps cwclip_kernels"
        )
    with torch.cuda.device(device):
        reason = extension.cuda_obstacle(device.index or 0)
    if reason:
        return (
            f"can't run on {torch.cuda.get_device_name(device)} ({reason}); reinstall with TORCH_CUDA_ARCH_LIST set "
            "to its compute capability, by a CUDA toolkit that its driver knows"
        )
    return None


def power_sums(bucket: Bucket, grads: list[Tensor], norm_type: float, addresses: bytes | None = None) -> Tensor:
    """sum |g|^p of each component, or max |g|: float64 [K]."""
    sums = torch.empty(bucket.count, dtype=torch.float64, device=bucket.device)
    with _on(bucket.device):
        _enqueue(bucket, grads, addresses, _POWER_SUMS, ClipRule(norm_type), sums=sums)
    return sums


def scale_(
    bucket: Bucket, grads: list[Tensor], coefs: Tensor, zero_fill: bool, addresses: bytes | None = None
) -> None:
    """g <- coef * g in place; nothing written where coef is 1."""
    rule = ClipRule(nonfinite="zero" if zero_fill else "propagate")
    with _on(bucket.device):
        _enqueue(bucket, grads, addresses, _SCALE, rule, coefs=coefs.contiguous())


def clip_(
    bucket: Bucket,
    grads: list[Tensor],
    caps: Tensor,
    rule: ClipRule,
    loss_scale: LossScale = UNSCALED,
    addresses: bytes | None = None,
) -> tuple[Tensor, Tensor]:
    """Norms and coefficients, both [K] in ``bucket.norm_dtype``, after scaling ``grads`` in place."""
    norms = torch.empty(bucket.count, dtype=bucket.norm_dtype, device=bucket.device)
    coefs = torch.empty_like(norms)
    with _on(bucket.device):
        _enqueue(bucket, grads, addresses, _CLIP, rule, norms=norms, coefs=coefs, caps=caps, loss_scale=loss_scale)
    return norms, coefs


# ------------------------------------------------------------------------------------------------------------
# Launching
# ------------------------------------------------------------------------------------------------------------


@dataclass
class _State:
    """What a bucket keeps from call to call.

    Attributes:
        addresses: of its gradients.
        program: what the host has to know about the tables.
        tables: uint8, on the device.
        arrived: when the tables have; None on the CPU.
        workspace_bytes: device memory that a call needs beside its results.
        workspaces: for each stream, zero between calls: calls on one stream come one after another.
    """

    addresses: native.Addresses
    program: bytes
    tables: Tensor
    arrived: torch.cuda.Event | None
    workspace_bytes: int
    workspaces: dict[int, Tensor] = field(default_factory=dict)


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Makes it the current device, which costs something, if it isn't."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def _enqueue(
    bucket: Bucket,
    grads: list[Tensor],
    addresses: bytes | None,
    kind: int,
    rule: ClipRule,
    *,
    sums: Tensor | None = None,
    norms: Tensor | None = None,
    coefs: Tensor | None = None,
    caps: Tensor | None = None,
    loss_scale: LossScale = UNSCALED,
) -> None:
    extension = native.module()
    device = bucket.device.index or 0
    stream, capturing = extension.cuda_stream(device)
    make = partial(_make_state, capturing)
    state, places = native.look_up(bucket, grads, addresses, make, writes=kind != _POWER_SUMS)
    workspace: Tensor | None
    if capturing:
        # Of the graph's own, since it may run beside calls outside of it, and zeroed at every replay.
        workspace = torch.zeros(state.workspace_bytes, dtype=torch.uint8, device=bucket.device)
        keep_for_graphs(state.tables, caps, loss_scale)
    else:
        workspace = state.workspaces.get(stream)
        if workspace is None:
            workspace = state.workspaces[stream] = _workspace(state, bucket.device)
    try:
        extension.cuda_enqueue(
            kind,
            rule.norm_type,
            state.program,
            places,
            state.tables.data_ptr(),
            workspace.data_ptr(),
            _address(sums),
            _address(norms),
            _address(coefs),
            _address(loss_scale.found_inf),
            _address(caps),
            caps.stride(0) if caps is not None and caps.ndim else 0,
            _address(loss_scale.inverse),
            rule.eps,
            native.POLICY_CODES[rule.nonfinite],
            coefs is not None and coefs.dtype == torch.float64,
            device,
            stream,
        )
    except RuntimeError:
        state.workspaces.pop(stream, None)  # half a call may have been launched, and not left zeros
        raise


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _workspace(state: _State, device: torch.device) -> Tensor:
    """Zeros, for the current stream, which from here on also sees the tables."""
    if state.arrived is not None:
        stream = torch.cuda.current_stream(device)
        stream.wait_event(state.arrived)
        state.tables.record_stream(stream)
    return torch.zeros(state.workspace_bytes, dtype=torch.uint8, device=device)


def _make_state(capturing: bool, bucket: Bucket, addresses: native.Addresses) -> _State:
    if capturing:
        raise RuntimeError(BEFORE_CAPTURE)
    cuts = bucket.cuts()
    tables, program, workspace_bytes = native.module().cuda_program(
        addresses.layout,
        native.bytes_of(bucket.components),
        None if cuts is None else native.packed(cuts),
        bucket.count,
    )
    on_device = upload(torch.frombuffer(bytearray(tables), dtype=torch.uint8), bucket.device)
    arrived = None
    if on_device.is_cuda:
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record(torch.cuda.current_stream(bucket.device))
    return _State(addresses, program, on_device, arrived, workspace_bytes)
