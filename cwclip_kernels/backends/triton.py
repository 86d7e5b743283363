"""Triton kernels: NVIDIA, AMD and Intel GPUs, and CPU tensors under Triton's interpreter.

    clip_        power_sums_kernel for each dtype, then clip_kernel for each dtype
    power_sums   power_sums_kernel for each dtype, then combine_kernel
    scale_       scale_kernel for each dtype

and one combine_kernel more where a component is very large. Bytes: each gradient is read once; a clipped one
is read once more and written. Launches follow one another on the current stream and share nothing else: no
atomics, no host sync, no copy to the device while the gradients stay where they are.

Gradients without gaps in memory are worked on in place, in whatever order their dimensions lie. Others are
copied to contiguous scratch and, after scaling, back: always, as the host can't know whether a coefficient
is 1.

CUDA graphs: call once before capturing, as for any Triton kernel. Addresses are frozen into the graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..formula import ClipRule
from . import extension
from .memory import BEFORE_CAPTURE, keep_for_graphs, upload

if TYPE_CHECKING:
    from ..plan import Bucket

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_ORDERS = (1.0, 2.0, math.inf)

# Blocks of _ROWS x 4 KB give each of 256 threads _ROWS loads of 16 bytes in flight. A tile of a few blocks
# pays for its program, and is small enough to spread over all processors. Coarser ones for scaling: many find
# a coefficient of 1 and leave.
_THREADS = 256
_ROWS = 8
_SUM_TILE_BYTES = 64 << 10
_SCALE_TILE_BYTES = 256 << 10
# Every program that clips first adds up its component's partials. Beyond this number of them, sum tiles grow
# up to the size of scale tiles; where that is not enough, partials are merged in a launch of their own.
_CHUNK = 1024


def refuses(device: torch.device, dtype: torch.dtype, norm_type: float) -> str | None:
    """Why this backend can't serve such a gradient, or None."""
    if norm_type not in _ORDERS:
        return f"serves norm_type 1, 2 and inf, not {norm_type:g}"
    if dtype not in _DTYPES and not (dtype in (torch.complex64, torch.complex128) and norm_type == 2.0):
        return f"does not serve {dtype} for norm_type {norm_type:g}"
    return unavailable(device)


@cache
def unavailable(device: torch.device) -> str | None:
    """Why Triton can't run on this device and what to do about it, or None."""
    if device.type not in ("cuda", "xpu", "cpu"):
        return f"serves CUDA, ROCm and XPU devices, not {device.type}"
    try:
        interpreted = _kernels().interpreted
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
    return None


def power_sums(bucket: Bucket, grads: list[Tensor], norm_type: float) -> Tensor:
    """sum |g|^p of each component, or max |g|: float64 [K]."""
    sums = torch.zeros(bucket.count, dtype=torch.float64, device=bucket.device)
    with _launching_on(bucket.device):
        call = _prepare(bucket, grads)
        if call.tables.tiles:
            _combine(_partials(call, norm_type), call.tables.spans, sums, norm_type)
    return sums


def scale_(bucket: Bucket, grads: list[Tensor], coefs: Tensor, zero_fill: bool) -> None:
    """``g <- coef * g`` in place; nothing written where coef is 1."""
    with _launching_on(bucket.device):
        call = _prepare(bucket, grads)
        coefs = coefs.contiguous()
        for dtype, tiles in call.tables.scale_tiles:
            _kernels().scale_kernel[(len(tiles),)](call.addresses, tiles, coefs, ZERO_FILL=zero_fill, **_block(dtype))
        call.copy_back(grads)


def clip_(bucket: Bucket, grads: list[Tensor], caps: Tensor, rule: ClipRule) -> tuple[Tensor, Tensor]:
    """Norms and coefficients, both [K] in ``bucket.norm_dtype``, after scaling ``grads`` in place."""
    norms = torch.empty(bucket.count, dtype=bucket.norm_dtype, device=bucket.device)
    coefs = torch.empty_like(norms)
    with _launching_on(bucket.device):
        call = _prepare(bucket, grads)
        if not call.tables.covers_all:  # no program writes the results of components without elements
            norms.fill_(0.0)
            coefs.fill_(1.0)
        partials = _partials(call, rule.norm_type)
        for dtype, tiles in call.tables.scale_tiles:
            _kernels().clip_kernel[(len(tiles),)](
                call.addresses,
                tiles,
                partials,
                call.tables.spans,
                caps,
                caps.stride(0) if caps.ndim else 0,
                norms,
                coefs,
                ORDER=rule.norm_type,
                EPS=rule.eps,
                NONFINITE=rule.nonfinite,
                CHUNK=_CHUNK,
                **_block(dtype),
            )
        call.copy_back(grads)
    return norms, coefs


# ------------------------------------------------------------------------------------------------------------
# Launching
# ------------------------------------------------------------------------------------------------------------


def _partials(call: _Call, norm_type: float) -> Tensor:
    """Launches the first pass: partial power sums, float64, to be read with ``call.tables.spans``."""
    tables = call.tables
    partials = torch.empty(tables.tiles, dtype=torch.float64, device=call.addresses.device)
    for dtype, tiles in tables.sum_tiles:
        _kernels().power_sums_kernel[(len(tiles),)](call.addresses, tiles, partials, ORDER=norm_type, **_block(dtype))
    if tables.chunks is None:
        return partials
    merged = partials.new_empty(len(tables.chunks) - 1)
    _combine(partials, tables.chunks, merged, norm_type)
    return merged


def _combine(partials: Tensor, spans: Tensor, sums: Tensor, norm_type: float) -> None:
    _kernels().combine_kernel[(len(sums),)](
        partials, spans, sums, ORDER=norm_type, CHUNK=_CHUNK, enable_fp_fusion=True
    )


@cache
def _kernels() -> Any:
    """The device code, imported when first needed: Triton may be missing, and takes its time."""
    from ..kernels import combine, power_sums, scale, tile

    return SimpleNamespace(
        interpreted=tile.INTERPRETED.value,
        power_sums_kernel=power_sums.power_sums_kernel,
        combine_kernel=combine.combine_kernel,
        scale_kernel=scale.scale_kernel,
        clip_kernel=scale.clip_kernel,
    )


@cache
def _block(dtype: torch.dtype) -> dict[str, Any]:
    """Launch configuration for one dtype. Fixed: tuning would scale the gradients over and over."""
    import triton.language as tl

    warp = 64 if torch.version.hip else 32
    return {
        "DTYPE": getattr(tl, str(dtype).removeprefix("torch.")),
        "ROWS": _ROWS,
        "COLUMNS": _THREADS * 16 // dtype.itemsize,
        "num_warps": _THREADS // warp,
        "enable_fp_fusion": True,  # asked for by name: the default differs between versions of Triton
    }


def _launching_on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, whatever device its arguments are on."""
    if device.type == "cpu":
        import numpy  # the interpreter computes with it; its warnings of overflow and the like are not ours

        return numpy.errstate(all="ignore")
    context: AbstractContextManager[object] = torch.get_device_module(device).device(device)
    return context


# ------------------------------------------------------------------------------------------------------------
# What the kernels look up: addresses, which move, and tables, which don't
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tables:
    """The static part of a bucket.

    Attributes:
        tiles: number of sum tiles, hence of partials.
        sum_tiles: for each dtype int64 [programs, 4]: gradient, start, length, slot among the partials.
        scale_tiles: for each dtype int64 [programs, 5]: gradient, start, length, component, whether it is the
            component's first.
        chunks: int64 [m + 1]; the m runs of partials to merge first, None if no component has too many.
        spans: int64 [K + 1]; component c has (merged) partials spans[c] to spans[c + 1].
        covers_all: whether every component has a tile.
        gapped: indices of gradients with gaps in memory.
    """

    tiles: int
    sum_tiles: tuple[tuple[torch.dtype, Tensor], ...]
    scale_tiles: tuple[tuple[torch.dtype, Tensor], ...]
    chunks: Tensor | None
    spans: Tensor
    covers_all: bool
    gapped: tuple[int, ...]

    def to(self, device: torch.device) -> _Tables:
        return replace(
            self,
            sum_tiles=tuple((dtype, upload(t, device)) for dtype, t in self.sum_tiles),
            scale_tiles=tuple((dtype, upload(t, device)) for dtype, t in self.scale_tiles),
            chunks=None if self.chunks is None else upload(self.chunks, device),
            spans=upload(self.spans, device),
        )


@dataclass(frozen=True)
class _Call:
    """One call's view: tables and addresses (int64 [n]) on the device, and copies of gapped gradients."""

    tables: _Tables
    addresses: Tensor
    pointers: tuple[int, ...]
    staged: Sequence[tuple[int, Tensor]] = ()

    def copy_back(self, grads: list[Tensor]) -> None:
        for i, copy in self.staged:
            grads[i].copy_(copy)


def _prepare(bucket: Bucket, grads: list[Tensor]) -> _Call:
    """Looks up or builds what the kernels need."""
    scratch = bucket.scratch
    # Shapes are constant over a plan's life, except for the values of sparse gradients.
    layout = None if bucket.plain else [(g.dtype, g.shape, g.stride()) for g in grads]
    if "tables" not in scratch or scratch["layout"] != layout:
        with torch.device("cpu"):  # whatever the default device is
            tables = _build_tables(bucket, grads)
        scratch.clear()
        scratch.update(tables=tables, layout=layout, calls={})
    staged = [(i, grads[i].contiguous()) for i in scratch["tables"].gapped]
    pointers = _pointers(bucket, grads, staged)
    if bucket.device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return _prepare_captured(bucket, pointers, staged)
        if "spare" not in scratch:
            scratch["spare"] = _pinned(len(pointers))
    # One for each stream: on others, its tables may not have arrived yet.
    stream = torch.accelerator.current_stream().stream_id if bucket.device.type != "cpu" else 0
    last: _Call | None = scratch["calls"].get(stream)
    if last is None or last.pointers != pointers:
        tables = last.tables if last else scratch["tables"].to(bucket.device)
        addresses = upload(_on_host(pointers), bucket.device)
        last = scratch["calls"][stream] = _Call(tables, addresses, pointers)
    return replace(last, staged=staged) if staged else last


def _pointers(bucket: Bucket, grads: list[Tensor], staged: Sequence[tuple[int, Tensor]]) -> tuple[int, ...]:
    """Addresses, of the copies where there are some; the same object while nothing moves.

    Raises:
        RuntimeError: these are not the gradients that the plan was made for.
    """
    if not bucket.plain or extension.unavailable() is not None:
        pointers = tuple(map(Tensor.data_ptr, grads))
    else:
        scratch = bucket.scratch
        if "addresses" not in scratch:
            scratch.update(addresses=extension.Addresses(grads), found=b"", pointers=())
        found = scratch["addresses"].of(grads)
        if found is not scratch["found"]:
            scratch.update(found=found, pointers=tuple(memoryview(found).cast("Q")))
        pointers = scratch["pointers"]
    if staged:
        copies = dict(staged)
        pointers = tuple(copies[i].data_ptr() if i in copies else at for i, at in enumerate(pointers))
    return pointers


def _prepare_captured(bucket: Bucket, pointers: tuple[int, ...], staged: Sequence[tuple[int, Tensor]]) -> _Call:
    """Addresses of the graph's own, copied at each replay from host memory that nobody writes again."""
    earlier = next(iter(bucket.scratch["calls"].values()), None)
    if earlier is None:
        raise RuntimeError(BEFORE_CAPTURE)
    host = bucket.scratch.pop("spare", None)
    if host is None:  # a second capture in a row; allocating now may fail in older versions of torch
        host = _pinned(len(pointers))
    host.copy_(_on_host(pointers))
    addresses = torch.empty(len(pointers), dtype=torch.int64, device=bucket.device)
    addresses.copy_(host, non_blocking=True)
    keep_for_graphs(host, earlier.tables)
    return _Call(earlier.tables, addresses, pointers, staged)


def _on_host(pointers: tuple[int, ...]) -> Tensor:
    return torch.tensor(pointers, dtype=torch.int64, device="cpu")


def _pinned(length: int) -> Tensor:
    return torch.empty(length, dtype=torch.int64, device="cpu", pin_memory=True)


def _build_tables(bucket: Bucket, grads: list[Tensor]) -> _Tables:
    """Cuts the gradients into tiles, by components, so that each component's partials lie together."""
    owner, count = bucket.components, bucket.count
    order = owner.argsort(stable=True)
    numels = torch.tensor([g.numel() for g in grads], dtype=torch.int64)
    itemsizes = torch.tensor([g.element_size() for g in grads], dtype=torch.int64)

    sum_bytes = torch.full((count,), _SUM_TILE_BYTES)
    while True:
        gradient, start, length = _cut(numels, sum_bytes[owner] // itemsizes, order)
        counts = owner[gradient].bincount(minlength=count)
        coarser = (counts > _CHUNK) & (sum_bytes < _SCALE_TILE_BYTES)
        if not coarser.any():
            break
        sum_bytes[coarser] *= 2
    sum_tiles = torch.stack((gradient, start, length, torch.arange(len(gradient))), 1)

    chunks, spans = None, _offsets(counts)
    if bool((counts > _CHUNK).any()):
        component, _, merged = _cut(counts, torch.full((count,), _CHUNK), torch.arange(count))
        chunks, spans = _offsets(merged), _offsets(component.bincount(minlength=count))

    gradient, start, length = _cut(numels, _SCALE_TILE_BYTES // itemsizes, order)
    component = owner[gradient]
    is_first = component != torch.cat((torch.tensor([-1]), component[:-1]))
    # What was read last is scaled first: it may still be in the cache.
    scale_tiles = torch.stack((gradient, start, length, component, is_first), 1).flip(0)

    dtypes = list(dict.fromkeys(g.dtype for g in grads))
    dtype_of = torch.tensor([dtypes.index(g.dtype) for g in grads])

    def by_dtype(tiles: Tensor) -> list[tuple[torch.dtype, Tensor]]:
        codes = dtype_of[tiles[:, 0]]
        groups = [(dtype, tiles[codes == code].contiguous()) for code, dtype in enumerate(dtypes)]
        return [(dtype, group) for dtype, group in groups if len(group)]

    return _Tables(
        tiles=len(sum_tiles),
        sum_tiles=tuple(by_dtype(sum_tiles)),
        scale_tiles=tuple(reversed(by_dtype(scale_tiles))),
        chunks=chunks,
        spans=spans,
        covers_all=bool((counts > 0).all()),
        gapped=tuple(i for i, g in enumerate(grads) if not _is_dense(g)),
    )


def _cut(lengths: Tensor, steps: Tensor, order: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cuts run i of lengths[i] into pieces of steps[i], the last one shorter, runs in the given order.

    Returns:
        Run, start in the run, and length of each piece; int64.
    """
    pieces = (lengths + steps - 1) // steps
    run = order.repeat_interleave(pieces[order])
    first = _offsets(pieces[order])[:-1].repeat_interleave(pieces[order])
    start = (torch.arange(len(run)) - first) * steps[run]
    return run, start, torch.minimum(steps[run], lengths[run] - start)


def _offsets(counts: Tensor) -> Tensor:
    """Where consecutive groups of these sizes start, and where the last one ends: int64 [len + 1]."""
    return torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0)))


def _is_dense(grad: Tensor) -> bool:
    """Whether the elements fill their memory without gaps, in whatever order of dimensions."""
    if grad.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((st, n) for st, n in zip(grad.stride(), grad.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True
