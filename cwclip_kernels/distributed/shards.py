"""Which part of a parameter this rank holds: logical slices to slices of the local tensor. Nothing is communicated.

A DTensor's ``Shard`` cuts a dimension as ``torch.chunk`` does; ``_StridedShard``, as FSDP2 makes it over tensor
parallelism, cuts it into ``split_factor`` pieces first and takes a chunk of each. A ``FlatParameter`` of
``FullyShardedDataParallel`` is a stretch of all its original parameters, laid end to end.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..components.membership import Slice
from ..components.naming import without_wrappers

Runs: TypeAlias = tuple[tuple[int, int], ...]  # start and length of consecutive indices, in local order


@dataclass(frozen=True)
class Layout:
    """A parameter of which this rank may hold only a part.

    Attributes:
        shape: of the whole.
        runs: of each dimension that is cut, the indices held here.
        mesh: the DTensor's device mesh; None for a ``FlatParameter``.
        placements: the DTensor's.
        cut_by: dimensions of the mesh, of more than one rank, over which the parts are spread.
    """

    shape: tuple[int, ...]
    runs: dict[int, Runs]
    mesh: Any = None
    placements: tuple[Any, ...] = ()
    cut_by: tuple[int, ...] = ()

    @property
    def local_shape(self) -> tuple[int, ...]:
        """The shape of what is held here."""
        return tuple(
            sum(length for _, length in self.runs[d]) if d in self.runs else n for d, n in enumerate(self.shape)
        )

    def local(self, box: Slice) -> list[Slice]:
        """What is held here of a slice of the whole, as slices of the local tensor; none if nothing is."""
        along = []
        for dim, start, size in box:
            held = self.runs.get(dim, ((0, self.shape[dim]),))
            along.append([(dim, *place) for place in _common(held, start, start + size)])
        return [tuple(chosen) for chosen in product(*along)]


def _common(held: Runs, start: int, stop: int) -> list[tuple[int, int]]:
    """Where indices [start, stop) lie among those held: places and lengths, neighbours joined."""
    found: list[tuple[int, int]] = []
    place = 0
    for first, length in held:
        low, high = max(first, start), min(first + length, stop)
        if low < high:
            at = place + low - first
            if found and sum(found[-1]) == at:
                found[-1] = found[-1][0], found[-1][1] + high - low
            else:
                found.append((at, high - low))
        place += length
    return found


def layout_of(tensor: Tensor, name: str) -> Layout | None:
    """How a parameter is sharded, None if its tensor is all that there is to it.

    Raises:
        ValueError: a placement that no part of a gradient could be told by; names the parameter.
    """
    if is_dtensor(tensor):
        return _layout_of_dtensor(tensor, name)
    if is_flat(tensor):
        return _layout_of_flat(tensor)
    return None


def place_of(tensor: Any) -> Layout | None:
    """Where a DTensor is, if not what is held of it."""
    if not is_dtensor(tensor):
        return None
    return Layout(tuple(tensor.shape), {}, tensor.device_mesh, tuple(tensor.placements))


# ------------------------------------------------------------------------------------------------------------
# DTensor
# ------------------------------------------------------------------------------------------------------------


def is_dtensor(tensor: Tensor) -> bool:
    """Whether it is a DTensor; who has none doesn't pay for importing them."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _layout_of_dtensor(tensor: Any, name: str) -> Layout:
    mesh, placements, shape = tensor.device_mesh, tuple(tensor.placements), tuple(tensor.shape)
    coordinate = mesh.get_coordinate()
    if coordinate is None:  # this rank is not of the mesh and holds nothing
        return Layout(shape, dict.fromkeys(range(len(shape)), ()), mesh, placements)
    runs: dict[int, Runs] = {}
    for place, parts, index in zip(placements, mesh.shape, coordinate, strict=True):
        if place.is_replicate():
            continue
        dim = getattr(place, "dim", None)
        if dim is None or place.is_partial():
            raise ValueError(
                f"parameters: {name!r} has placements {placements}, and {place} is none that can be clipped; "
                "redistribute it to Shard or Replicate"
            )
        dim %= len(shape)
        held = runs.get(dim, ((0, shape[dim]),))
        factor = getattr(place, "split_factor", 1)
        pieces = (_chunk(held, factor, piece) for piece in range(factor))
        runs[dim] = _joined(run for piece in pieces for run in _chunk(piece, parts, index))
    cut_by = tuple(i for i, place in enumerate(placements) if not place.is_replicate() and mesh.size(i) > 1)
    layout = Layout(shape, runs, mesh, placements, cut_by)
    local = tuple(tensor._local_tensor.shape)
    if layout.local_shape != local:
        raise ValueError(
            f"parameters: this rank should hold {list(layout.local_shape)} of {name!r} ({list(shape)}, "
            f"{placements}), but holds {list(local)}; a DTensor sharded unevenly by hand can't be clipped"
        )
    return layout


def _chunk(held: Runs, parts: int, index: int) -> Runs:
    """One of the pieces that ``torch.chunk`` makes of these indices, empty where it makes fewer."""
    total = sum(length for _, length in held)
    size = -(-total // parts)
    return _stretch(held, min(size * index, total), min(size * (index + 1), total))


def _stretch(held: Runs, start: int, stop: int) -> Runs:
    """The indices at places [start, stop) among those held."""
    found = []
    place = 0
    for first, length in held:
        low, high = max(place, start), min(place + length, stop)
        if low < high:
            found.append((first + low - place, high - low))
        place += length
    return tuple(found)


def _joined(runs: Iterator[tuple[int, int]]) -> Runs:
    found: list[tuple[int, int]] = []
    for start, length in runs:
        if found and sum(found[-1]) == start:
            found[-1] = found[-1][0], found[-1][1] + length
        else:
            found.append((start, length))
    return tuple(found)


# ------------------------------------------------------------------------------------------------------------
# FullyShardedDataParallel's FlatParameter (use_orig_params=False)
# ------------------------------------------------------------------------------------------------------------

_FLAT = "_flat_param"


@dataclass(frozen=True)
class Original:
    """A parameter as it was before it was laid into a flat one.

    Attributes:
        name: in the model, without what wrappers add.
        tensor: of its shape and dtype, on the meta device.
        start: of its first element in the flat parameter.
    """

    name: str
    tensor: Tensor
    start: int

    def flat(self, box: Slice) -> Slice:
        """The place of a slice of the original.

        Raises:
            ValueError: a slice along another dimension than 0, which isn't one stretch.
        """
        if any(dim != 0 for dim, _, _ in box):
            raise ValueError(
                f"components: {self.name!r} lies flat in FullyShardedDataParallel and can be cut along dim 0 only"
            )
        row = prod(self.tensor.shape[1:])
        start, size = (box[0][1] * row, box[0][2] * row) if box else (0, self.tensor.numel())
        return ((0, self.start + start, size),)


def is_flat(tensor: Tensor) -> bool:
    """Whether it is a ``FlatParameter``."""
    return getattr(tensor, "_is_flat_param", False)


def is_flattened(tensor: Tensor) -> bool:
    """Whether it is ``FullyShardedDataParallel``'s: a ``FlatParameter``, or a view of one."""
    return getattr(tensor, "_fsdp_flattened", False)


def originals_of(name: str, flat: Any, named: bool) -> Sequence[Original]:
    """The parameters that lie in a flat one, under their own names where its name says where it belongs."""
    prefix = name.removesuffix(_FLAT) if named and name.endswith(_FLAT) else f"{name}."
    shapes, names = iter(flat._shapes), iter(flat._fqns)
    found = []
    start = 0
    for numel, is_padding in zip(flat._numels_with_padding, flat._is_padding_mask, strict=True):
        if not is_padding:
            tensor = torch.empty(next(shapes), dtype=flat.dtype, device="meta")
            original = nn.Parameter(tensor, requires_grad=flat.requires_grad)
            found.append(Original(prefix + without_wrappers(next(names)), original, start))
        start += numel
    return found


def _layout_of_flat(flat: Any) -> Layout:
    held, whole = flat._sharded_size.numel(), flat._unpadded_unsharded_size.numel()
    infos = zip(flat._shard_param_infos, _starts(flat), strict=True)
    # Where the shard begins is told by the first original parameter that reaches into it.
    starts = [start + info.intra_param_start_idx - info.offset_in_shard for info, start in infos if info.in_shard]
    first = starts[0] if starts else whole  # of nothing but padding
    return Layout((whole,), {0: ((first, held),)})


def _starts(flat: Any) -> Iterator[int]:
    start = 0
    for numel, is_padding in zip(flat._numels_with_padding, flat._is_padding_mask, strict=True):
        if not is_padding:
            yield start
        start += numel
