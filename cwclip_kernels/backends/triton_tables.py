"""The static side of a Triton call: gradients, or pieces of them, cut into tiles."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.bucket import Bucket
from .memory import upload

# A tile of a few blocks pays for its program, and is small enough to spread over all processors. Coarser ones for
# scaling: many find a coefficient of 1 and leave.
SUM_TILE_BYTES = 64 << 10
SCALE_TILE_BYTES = 256 << 10
# Every program that clips first adds up its component's partials. Beyond this number of them, sum tiles grow
# up to the size of scale tiles; where that is not enough, partials are merged in a launch of their own.
CHUNK = 1024


class Group(NamedTuple):
    """The tiles of one launch.

    Attributes:
        dtype: of their gradients.
        dims: how many dimensions the runs of elements with gaps have at most; 0 for runs without.
        tiles: int64 [programs, 5 or 6], as the kernels read it.
    """

    dtype: torch.dtype
    dims: int
    tiles: Tensor

    def to(self, device: torch.device) -> Group:
        """The same on a device."""
        return self._replace(tiles=upload(self.tiles, device))


@dataclass(frozen=True)
class Tables:
    """The static part of a bucket.

    Attributes:
        tiles: number of sum tiles, hence of partials.
        sum_tiles: rows of gradient, start, length, slot among the partials, layout.
        scale_tiles: rows of gradient, start, length, component, whether it is the component's first, layout.
        layouts: int64, for each piece with gaps its offset, then size and stride of each dimension, innermost first.
        chunks: int64 [m + 1]; the m runs of partials to merge first, None if no component has too many.
        spans: int64 [K + 1]; component c has (merged) partials spans[c] to spans[c + 1].
        covers_all: whether every component has a tile.
    """

    tiles: int
    sum_tiles: tuple[Group, ...]
    scale_tiles: tuple[Group, ...]
    layouts: Tensor
    chunks: Tensor | None
    spans: Tensor
    covers_all: bool

    def to(self, device: torch.device) -> Tables:
        """The same on a device."""
        return replace(
            self,
            sum_tiles=tuple(group.to(device) for group in self.sum_tiles),
            scale_tiles=tuple(group.to(device) for group in self.scale_tiles),
            layouts=upload(self.layouts, device),
            chunks=None if self.chunks is None else upload(self.chunks, device),
            spans=upload(self.spans, device),
        )


def build_tables(bucket: Bucket, grads: list[Tensor]) -> Tables:
    """Cuts the gradients into tiles, by components, so that each component's partials lie together."""
    owner, count = bucket.components, bucket.count
    order = owner.argsort(stable=True)
    pieces = _pieces(bucket, grads)

    sum_bytes = torch.full((count,), SUM_TILE_BYTES)
    while True:
        piece, start, length = _cut(pieces.numels, sum_bytes[owner] // pieces.itemsizes, order)
        counts = owner[piece].bincount(minlength=count)
        coarser = (counts > CHUNK) & (sum_bytes < SCALE_TILE_BYTES)
        if not coarser.any():
            break
        sum_bytes[coarser] *= 2
    sum_tiles = pieces.groups(piece, start, length, torch.arange(len(piece)))

    chunks, spans = None, _offsets(counts)
    if bool((counts > CHUNK).any()):
        component, _, merged = _cut(counts, torch.full((count,), CHUNK), torch.arange(count))
        chunks, spans = _offsets(merged), _offsets(component.bincount(minlength=count))

    # What was read last is scaled first: it may still be in the cache.
    piece, start, length = (
        column.flip(0) for column in _cut(pieces.numels, SCALE_TILE_BYTES // pieces.itemsizes, order)
    )
    component = owner[piece]
    is_first = component != torch.cat((component[1:], torch.tensor([-1])))
    scale_tiles = pieces.groups(piece, start, length, component, is_first)

    return Tables(
        tiles=sum(len(group.tiles) for group in sum_tiles),
        sum_tiles=tuple(sum_tiles),
        scale_tiles=tuple(reversed(scale_tiles)),
        layouts=pieces.layouts,
        chunks=chunks,
        spans=spans,
        covers_all=bool((counts > 0).all()),
    )


@dataclass(frozen=True)
class _Pieces:
    """The pieces of a bucket's gradients, m of them; each column int64 [m].

    Attributes:
        gradients: which gradient each is a piece of.
        offsets: elements from that gradient's first to its own, 0 where ``layouts`` has it.
        numels: elements of each.
        itemsizes: bytes of an element.
        places: where its layout begins in ``layouts``, -1 for a piece without gaps.
        dims: how many dimensions the layouts have; 0 if there are none.
        layouts: int64, see ``Tables``.
        dtypes: the bucket's dtypes.
        dtype_codes: which of them each has.
    """

    gradients: Tensor
    offsets: Tensor
    numels: Tensor
    itemsizes: Tensor
    places: Tensor
    dims: int
    layouts: Tensor
    dtypes: list[torch.dtype]
    dtype_codes: Tensor

    def groups(self, piece: Tensor, start: Tensor, length: Tensor, *more: Tensor) -> list[Group]:
        """Tiles in launches of one dtype each, those with gaps apart."""
        place = self.places[piece]
        rows = (self.gradients[piece], self.offsets[piece] + start, length, *more, place.clamp(min=0))
        tiles, codes = torch.stack(rows, 1), self.dtype_codes[piece]
        found = []
        for code, dtype in enumerate(self.dtypes):
            for dims in sorted({0, self.dims}):
                own = tiles[(codes == code) & ((place >= 0) == (dims > 0))]
                if len(own):
                    found.append(Group(dtype, dims, own.contiguous()))
        return found


def _pieces(bucket: Bucket, grads: list[Tensor]) -> _Pieces:
    boxes = bucket.slices if bucket.slices is not None else [(i, ()) for i in range(len(grads))]
    shapes = [(g.shape, g.stride()) for g in grads]  # a tensor's own are made anew each time they are asked for
    dtypes = list(dict.fromkeys(g.dtype for g in grads))
    code_of = [dtypes.index(g.dtype) for g in grads]
    itemsize_of = [g.element_size() for g in grads]
    gradients, offsets, numels, runs = [], [], [], []
    for i, box in boxes:
        sizes, strides = list(shapes[i][0]), shapes[i][1]
        offset, numel = 0, 1
        for dim, start, size in box:
            sizes[dim] = size
            offset += start * strides[dim]
        for size in sizes:
            numel *= size
        gradients.append(i)
        numels.append(numel)
        runs.append(_gaps(sizes, strides))
        offsets.append(offset)
    dims = max((len(run) for run in runs), default=0)
    layouts: list[int] = []
    places: list[int] = []
    for piece, run in enumerate(runs):
        if not run:
            places.append(-1)
            continue
        places.append(len(layouts))
        layouts += [offsets[piece], *(n for pair in run + [(1, 0)] * (dims - len(run)) for n in pair)]
        offsets[piece] = 0
    gradient = _int64(gradients)
    return _Pieces(
        gradient,
        _int64(offsets),
        _int64(numels),
        _int64(itemsize_of)[gradient],
        _int64(places),
        dims,
        _int64(layouts or [0]),
        dtypes,
        _int64(code_of)[gradient],
    )


def _int64(numbers: list[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64)


def _gaps(sizes: list[int], strides: tuple[int, ...]) -> list[tuple[int, int]]:
    """Size and stride of each dimension, innermost first, what lies seamlessly together as one; none without gaps."""
    if 0 in sizes:
        return []
    run: list[tuple[int, int]] = []
    for stride, size in sorted((st, n) for st, n in zip(strides, sizes, strict=True) if n != 1):
        if run and stride == run[-1][0] * run[-1][1]:
            run[-1] = (run[-1][0] * size, run[-1][1])
        else:
            run.append((size, stride))
    return [] if not run or run == [(run[0][0], 1)] else run


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
