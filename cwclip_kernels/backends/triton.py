"""Triton kernels: NVIDIA, AMD and Intel GPUs, and CPU tensors under Triton's interpreter.

    clip_        sum_or_clip_kernel, which is all that components of one tile take, up to 64 KB in one gradient; for
                 the others coefficients_kernel, then scale_kernel
    power_sums   power_sums_kernel, then combine_kernel
    scale_       scale_kernel

each for all dtypes, with one more combine_kernel where a component is very large. Bytes: each gradient is read once;
a clipped one is read again, from L2 if its component is one tile, and written. Launches follow one another on the
current stream: no atomics, no host sync, and no copy to the device while the gradients keep their addresses.

Gradients without gaps in memory are read 16 bytes at a time, in memory order. Others, and slices along other dims
than the first, are read element by element, in place and in launches of their own.

CUDA graphs: call once before capturing, as for any Triton kernel. Addresses are frozen into the graph.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.bucket import Bucket
from ..core.formula import ClipRule, has_float64
from ..core.loss_scale import LossScale
from . import triton_tables
from .memory import Numbers, Placed, stream_of
from .native import packed
from .served import unserved
from .triton_tables import Tiles, TileTables, build_tables

# Blocks of ROWS x 4 KB give each of 256 threads ROWS loads of 16 bytes to have in flight.
THREADS = 256
ROWS = 8


def refuses(device: torch.device, dtype: torch.dtype, norm_type: float) -> str | None:
    """Why this backend can't serve such a gradient, or None."""
    return unserved(dtype, norm_type) or unavailable(device)


@cache
def unavailable(device: torch.device) -> str | None:
    """Why Triton can't run on this device and what to do about it, or None."""
    if device.type not in ("cuda", "xpu", "cpu"):
        return f"serves CUDA, ROCm and XPU devices, not {device.type}"
    try:
        interpreted = kernels().interpreted
    except ImportError as error:
        return f"needs Triton 3.4 or newer ({error}): pip install --upgrade triton"
    if device.type == "cpu" and not interpreted:
        return (
            "serves CPU tensors only in Triton's (very slow) interpreter: set TRITON_INTERPRET=1 in the "
            "environment before triton is first imported"
        )
    if device.type != "cpu" and interpreted:
        return f"can't reach {device.type} memory from Triton's interpreter: unset TRITON_INTERPRET"
    nvidia = device.type == "cuda" and torch.version.hip is None
    if nvidia and torch.cuda.get_device_capability(device) < (7, 0):
        return "needs a GPU of compute capability 7.0 or newer"
    if not has_float64(device):
        return "computes norms in float64, which this GPU doesn't have: take backend='foreach', with float32 there"
    return None


def power_sums(bucket: Bucket, grads: list[Tensor], norm_type: float, addresses: bytes | None) -> Tensor:
    """sum |g|^p of each component, or max |g|: float64 [K]."""
    sums = torch.zeros(bucket.count, dtype=torch.float64, device=bucket.device)
    with launching_on(bucket.device):
        call = prepare(bucket, grads, addresses)
        if call.tables.count:
            partials = partial_sums(call, norm_type)
            _combine(_merged(call.tables, partials, norm_type), call.tables.spans, sums, norm_type)
    return sums


def scale_(bucket: Bucket, grads: list[Tensor], coefs: Tensor, zero_fill: bool, addresses: bytes | None) -> None:
    """``g <- coef * g`` in place; nothing written where coef is 1."""
    with launching_on(bucket.device):
        call = prepare(bucket, grads, addresses)
        factors = coefs.contiguous()
        for tiles in call.tables.scale_tiles:
            _launch("scale_kernel", call, tiles, len(tiles.rows), factors, ZERO_FILL=zero_fill)


def clip_(
    bucket: Bucket, grads: list[Tensor], caps: Tensor, rule: ClipRule, loss_scale: LossScale, addresses: bytes | None
) -> tuple[Tensor, Tensor]:
    """Norms and coefficients, both [K] in ``bucket.norm_dtype``, after scaling ``grads`` in place."""
    results = Results.of(bucket, caps, loss_scale)
    with launching_on(bucket.device):
        call = prepare(bucket, grads, addresses)
        tables, constants = call.tables, constants_of(rule)
        partials = torch.empty(tables.count, dtype=torch.float64, device=bucket.device)
        for tiles in tables.sum_tiles:
            own = (tiles.several, partials, *results)
            _launch("sum_or_clip_kernel", call, tiles, len(tiles.rows), *own, **constants)
        if len(tables.components):
            factors = factors_of(tables, partials, results, rule)
            for tiles in tables.scale_tiles:
                _launch("scale_kernel", call, tiles, tiles.several, factors, ZERO_FILL=rule.zero_fill)
    return results.norms, results.coefs


class Results(NamedTuple):
    """What norms are made into, and from: arguments of all kernels that do, in their order."""

    caps: Tensor
    cap_stride: int
    inverse: Tensor | None
    norms: Tensor
    coefs: Tensor
    found_inf: Tensor | None

    @classmethod
    def of(cls, bucket: Bucket, caps: Tensor, loss_scale: LossScale) -> Results:
        """With norms and coefficients to be written."""
        stride = caps.stride(0) if caps.ndim else 0
        return cls(caps, stride, loss_scale.inverse, *bucket.results(), loss_scale.found_inf)


def constants_of(rule: ClipRule) -> dict[str, Any]:
    """What of the rule is compiled into those kernels."""
    return {"ORDER": rule.norm_type, "EPS": rule.eps, "NONFINITE": rule.nonfinite}


def factors_of(tables: TileTables, partials: Tensor, results: Results, rule: ClipRule) -> Tensor:
    """Writes the results of ``tables.components`` from partial sums; of each what to multiply its gradients with."""
    merged = _merged(tables, partials, rule.norm_type)
    factors = None if results.inverse is None else torch.empty_like(results.norms, dtype=torch.float64)
    kernels().coefficients_kernel[(len(tables.components),)](
        *(tables.components, merged, tables.spans, *results, factors),
        **constants_of(rule),
        CHUNK=triton_tables.CHUNK,
        enable_fp_fusion=True,
    )
    return results.coefs if factors is None else factors


def partial_sums(call: Call, norm_type: float) -> Tensor:
    """Launches the first pass: partial power sums, float64."""
    partials = torch.empty(call.tables.count, dtype=torch.float64, device=call.addresses.device)
    for tiles in call.tables.sum_tiles:
        _launch("power_sums_kernel", call, tiles, len(tiles.rows), partials, ORDER=norm_type)
    return partials


def _merged(tables: TileTables, partials: Tensor, norm_type: float) -> Tensor:
    """Partial sums to be read with ``tables.spans``."""
    if tables.chunks is None:
        return partials
    merged = partials.new_empty(len(tables.chunks) - 1)
    _combine(partials, tables.chunks, merged, norm_type)
    return merged


def _launch(kernel: str, call: Call, tiles: Tiles, programs: int, *arguments: object, **constants: object) -> None:
    """One program for each of the first tiles, as many as that."""
    if programs:
        getattr(kernels(), kernel)[(programs,)](
            call.addresses,
            tiles.rows,
            call.tables.layouts,
            *arguments,
            **constants,
            **block(tiles.dtypes, tiles.dims),
        )


def _combine(partials: Tensor, spans: Tensor, sums: Tensor, norm_type: float) -> None:
    kernels().combine_kernel[(len(sums),)](
        partials, spans, sums, ORDER=norm_type, CHUNK=triton_tables.CHUNK, enable_fp_fusion=True
    )


@cache
def kernels() -> Any:
    """The kernels. Imported when first needed, since Triton may be missing and takes long to import."""
    from ..kernels import adamw, adamw_single, clip, coefficients, combine, power_sums, scale, tile

    return SimpleNamespace(
        interpreted=tile.INTERPRETED.value,
        power_sums_kernel=power_sums.power_sums_kernel,
        combine_kernel=combine.combine_kernel,
        scale_kernel=scale.scale_kernel,
        sum_or_clip_kernel=clip.sum_or_clip_kernel,
        coefficients_kernel=coefficients.coefficients_kernel,
        advance_kernel=adamw.advance_kernel,
        adamw_kernel=adamw.adamw_kernel,
        adamw_single_kernel=adamw_single.adamw_single_kernel,
    )


@cache
def block(dtypes: tuple[torch.dtype, ...], dims: int) -> dict[str, Any]:
    """The launch configuration. Fixed: tuning would scale the gradients over and over."""
    constants = {"DTYPES": tuple(map(type_of, dtypes)), "DIMS": dims, "ROWS": ROWS, "THREADS": THREADS}
    return constants | options()


def type_of(dtype: torch.dtype) -> Any:
    """Triton's name for it."""
    import triton.language as tl

    return getattr(tl, str(dtype).removeprefix("torch."))


@cache
def options() -> dict[str, Any]:
    """Of the compiler."""
    warp = 64 if torch.version.hip else 32
    # The default of the latter differs between versions of Triton.
    return {"num_warps": THREADS // warp, "enable_fp_fusion": True}


def launching_on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, whatever device its arguments are on."""
    if device.type == "cpu":
        import numpy  # the interpreter computes with it; its warnings of overflow say nothing here

        return numpy.errstate(all="ignore")
    context: AbstractContextManager[object] = torch.get_device_module(device).device(device)
    return context


class Call(NamedTuple):
    """What the kernels need of one call, on the device."""

    tables: TileTables
    addresses: Tensor  # of the gradients' first elements, int64 [n]


@dataclass
class _State:
    """What a bucket keeps from call to call."""

    signature: object  # of the gradients that the tables are of; None where the plan compares them
    tables: Placed[TileTables] | None = None  # once they are needed
    addresses: Numbers = field(default_factory=Numbers)


def prepare(bucket: Bucket, grads: list[Tensor], addresses: bytes | None) -> Call:
    """Looks up or builds what the kernels need."""
    state, device, stream = _state_of(bucket, grads), bucket.device, stream_of(bucket.device)
    if state.tables is None:
        with torch.device("cpu"):  # whatever the default device is
            state.tables = Placed(build_tables(bucket, grads))
    return Call(state.tables.on(device, stream), addresses_on(bucket, grads, addresses, stream))


def addresses_on(bucket: Bucket, grads: list[Tensor], addresses: bytes | None, stream: int | None) -> Tensor:
    """Of the gradients' first elements, on the device."""
    pointers = packed(map(Tensor.data_ptr, grads)) if addresses is None else addresses
    return _state_of(bucket, grads).addresses.on(bucket.device, pointers, stream)


def _state_of(bucket: Bucket, grads: list[Tensor]) -> _State:
    # Shapes are constant over a plan's life, except for the values of sparse gradients.
    signature = None if bucket.plain else [(g.dtype, g.shape, g.stride()) for g in grads]
    state: _State | None = bucket.state
    if state is None or state.signature != signature:
        state = bucket.state = _State(signature)
    return state
