"""Which part of a parameter this rank holds, worked out without communication.

A DTensor's ``Shard`` placement cuts a dimension as ``torch.chunk`` does. ``_StridedShard``, which FSDP2 uses over
tensor parallelism, cuts it into ``split_factor`` pieces first and takes a chunk of each. A ``FlatParameter`` of
``FullyShardedDataParallel`` (FSDP1) is a range of its original parameters laid end to end. An original
parameter of FSDP1 (``units``) is a range of one parameter laid flat, as is what an optimizer with partitions holds
(``partitions``).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, product
from math import prod
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..components.membership import Slice
from ..components.naming import without_wrappers

Runs: TypeAlias = tuple[tuple[int, int], ...]  # start and length of consecutive indices, in local order


@dataclass(eq=False)
class LocalShard:
    """What this rank holds of a DTensor, of a ``FlatParameter``, or of a parameter that was laid flat."""

    name: str
    shape: tuple[int, ...]  # of the whole parameter
    runs: dict[int, Runs]  # the indices held here, for each dimension that is sharded
    mesh: Any = None  # the DTensor's device mesh; None for the others
    placements: tuple[Any, ...] = ()
    mesh_dims: tuple[int, ...] = ()  # dimensions of the mesh, of more than one rank, over which it is sharded
    problem: str | None = None  # why its gradient can't be clipped
    grad_spec: Any = None  # of the last gradient that was found to have the parameter's placements
    group: Any = None  # of what isn't a DTensor: the ``RankGroup`` that holds it; None if this rank has all

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the local tensor."""
        return tuple(sum(length for _, length in self._runs(dim)) for dim in range(len(self.shape)))

    def local_slices(self, whole: Slice) -> list[Slice]:
        """The slices of the local tensor that hold elements of a slice of the whole."""
        held = [
            [(dim, *run) for run in _mapped(_spans(self._runs(dim)), start, start + size)]
            for dim, start, size in whole
        ]
        return list(product(*held))

    def _runs(self, dim: int) -> Runs:
        return self.runs.get(dim, ((0, self.shape[dim]),))


def _spans(runs: Runs) -> Iterator[tuple[int, int, int]]:
    """First index, first local index and length of each run."""
    local = 0
    for start, length in runs:
        yield start, local, length
        local += length


def _mapped(spans: Iterable[tuple[int, int, int]], start: int, stop: int) -> Runs:
    """What [start, stop) becomes under spans of (from, to, length); adjacent results are joined."""
    found: list[tuple[int, int]] = []
    for source, target, length in spans:
        low, high = max(source, start), min(source + length, stop)
        if low >= high:
            continue
        first = target + low - source
        if found and sum(found[-1]) == first:
            found[-1] = found[-1][0], found[-1][1] + high - low
        else:
            found.append((first, high - low))
    return tuple(found)


def shard_of(tensor: Tensor, name: str) -> LocalShard | None:
    """What this rank holds of a parameter; None if that is a plain tensor."""
    if is_dtensor(tensor):
        return _shard_of_dtensor(tensor, name)
    return _shard_of_flat(tensor, name) if is_flat(tensor) else None


def is_dtensor(tensor: Tensor) -> bool:
    """Whether it is a DTensor. Imports nothing: where no DTensor exists, their module may not be loaded."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _shard_of_dtensor(tensor: Any, name: str) -> LocalShard:
    mesh, placements, shape = tensor.device_mesh, tuple(tensor.placements), tuple(tensor.shape)
    shard = LocalShard(name, shape, {}, mesh, placements)
    coordinate = mesh.get_coordinate()
    if coordinate is None:  # this rank is outside of the mesh
        shard.runs = dict.fromkeys(range(len(shape)), ())
        return shard
    cuts = [i for i, placement in enumerate(placements) if not placement.is_replicate()]
    for i in cuts:
        placement = placements[i]
        if placement.is_partial() or not hasattr(placement, "dim"):
            shard.problem = (
                f"parameters: {name!r} has placements {placements}, and {placement} can't be clipped; "
                "redistribute it to Shard or Replicate"
            )
            return shard
        dim = placement.dim % len(shape)
        held, factor = shard._runs(dim), getattr(placement, "split_factor", 1)
        pieces = [_chunk(held, factor, piece) for piece in range(factor)]
        shard.runs[dim] = tuple(run for piece in pieces for run in _chunk(piece, mesh.size(i), coordinate[i]))
    shard.mesh_dims = tuple(i for i in cuts if mesh.size(i) > 1)
    local = tuple(tensor._local_tensor.shape)
    if shard.local_shape != local:
        shard.problem = (
            f"parameters: this rank should hold {list(shard.local_shape)} of {name!r} ({list(shape)}, "
            f"{placements}), but holds {list(local)}; a DTensor sharded unevenly by hand can't be clipped"
        )
    return shard


def _chunk(runs: Runs, parts: int, index: int) -> Runs:
    """One of the chunks that ``torch.chunk`` makes of these indices, empty where it makes fewer."""
    total = sum(length for _, length in runs)
    size = -(-total // parts)
    by_place = ((local, start, length) for start, local, length in _spans(runs))
    return _mapped(by_place, size * index, min(size * (index + 1), total))


@dataclass(frozen=True)
class Original:
    """A parameter as it was before ``FullyShardedDataParallel`` made it part of a flat one."""

    name: str  # in the model, without what wrappers add
    tensor: Tensor  # of its shape and dtype, on the meta device
    start: int  # index of its first element in the flat parameter

    def flat(self, part: Slice) -> Slice:
        """A slice of the original as a slice of the flat parameter; ValueError if it isn't contiguous."""
        start, size = flat_range(part, self.tensor.shape, self.name, "FullyShardedDataParallel")
        return ((0, self.start + start, size),)


def flat_range(part: Slice, shape: Sequence[int], name: str, holder: str) -> tuple[int, int]:
    """Start and length of a slice in its tensor laid flat; ValueError, which names both, if it isn't contiguous."""
    if any(dim != 0 for dim, _, _ in part):
        raise ValueError(f"components: {name!r} lies flat in {holder} and can be cut along dim 0 only")
    row = prod(shape[1:])
    return (part[0][1] * row, part[0][2] * row) if part else (0, prod(shape))


def is_flat(tensor: Tensor) -> bool:
    """Whether it is a ``FlatParameter``."""
    return getattr(tensor, "_is_flat_param", False)


def is_flattened(tensor: Tensor) -> bool:
    """Whether it belongs to ``FullyShardedDataParallel``: a ``FlatParameter``, or a view of one."""
    return getattr(tensor, "_fsdp_flattened", False)


def originals_of(name: str, flat: Any, named: bool) -> Iterator[Original]:
    """The parameters in a flat one; if the flat one is ``named``, with the names that they have in the model."""
    prefix = name.removesuffix("_flat_param") if named and name.endswith("_flat_param") else f"{name}."
    for start, shape, own_name in zip(_starts(flat), flat._shapes, flat._fqns, strict=True):
        tensor = nn.Parameter(torch.empty(shape, dtype=flat.dtype, device="meta"), flat.requires_grad)
        yield Original(prefix + without_wrappers(own_name), tensor, start)


def _shard_of_flat(flat: Any, name: str) -> LocalShard:
    held, whole = flat._sharded_size.numel(), flat._unpadded_unsharded_size.numel()
    infos = zip(flat._shard_param_infos, _starts(flat), strict=True)
    # The first original parameter that reaches into the shard says where the shard begins.
    starts = (start + info.intra_param_start_idx - info.offset_in_shard for info, start in infos if info.in_shard)
    return LocalShard(name, (whole,), {0: ((next(starts, whole), held),)})  # all of it may be padding


def _starts(flat: Any) -> list[int]:
    """Index of the first element of each original parameter."""
    starts = accumulate(flat._numels_with_padding, initial=0)
    return [start for start, is_padding in zip(starts, flat._is_padding_mask, strict=False) if not is_padding]
