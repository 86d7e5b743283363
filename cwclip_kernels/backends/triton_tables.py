"""The static side of a Triton call: gradients, or pieces of them, cut into tiles."""

from __future__ import annotations

import math
from collections.abc import Iterator
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
STEP_TILE_BYTES = 64 << 10  # of gradients, to which come parameters and states
# One program adds up the partials of a component. Beyond this number of them, sum tiles grow up to the size of scale
# tiles; where that is not enough, partials are merged in a launch of their own.
CHUNK = 1024


class Tiles(NamedTuple):
    """The tiles of one launch."""

    dtypes: tuple[torch.dtype, ...]  # of all gradients
    dims: int  # of the layouts, where there are gaps between elements; 0 where there are none
    rows: Tensor  # int64 [programs, 6 or 7], the tile table that kernels read
    several: int  # those of components of several tiles come first, as many as this; then the only ones of theirs


@dataclass(frozen=True)
class TileTables:
    """What is static about a bucket."""

    count: int  # of sum tiles, hence of partials
    sum_tiles: list[Tiles]  # rows of gradient, start, length, component, layout, dtype, slot among the partials
    scale_tiles: list[Tiles]  # rows of gradient, start, length, component, layout, dtype
    layouts: Tensor  # int64, of each piece with gaps its offset, then sizes and strides, innermost dim first
    chunks: Tensor | None  # int64 [m + 1], m runs of partials to merge first; None if no component has too many
    spans: Tensor  # int64 [K + 1], component c has (merged) partials spans[c] to spans[c + 1]
    components: Tensor  # int64, those of several tiles, or of none

    def to(self, device: torch.device) -> TileTables:
        """The same on a device."""
        return replace(
            self,
            sum_tiles=[tiles._replace(rows=upload(tiles.rows, device)) for tiles in self.sum_tiles],
            scale_tiles=[tiles._replace(rows=upload(tiles.rows, device)) for tiles in self.scale_tiles],
            layouts=upload(self.layouts, device),
            chunks=None if self.chunks is None else upload(self.chunks, device),
            spans=upload(self.spans, device),
            components=upload(self.components, device),
        )

    def tensors(self) -> list[Tensor]:
        """What they consist of."""
        tensors = [tiles.rows for tiles in self.sum_tiles + self.scale_tiles]
        tensors += [self.layouts, self.spans, self.components]
        return tensors if self.chunks is None else [*tensors, self.chunks]


class StepTiles(NamedTuple):
    """The tiles of one combination of dtypes in an optimizer's step.

    Rows of gradient, start, length, component, layout, the gradient's number from ``column``.
    """

    kind: int  # of their gradients, as given to ``build_step_tables``
    dims: int  # see ``Tiles``
    rows: Tensor  # int64 [programs, 6], the tile table that kernels read: those of ``rest``, then of ``single``
    rest: Tensor
    single: Tensor  # the only tiles of their components


@dataclass(frozen=True)
class StepTables:
    """What is static about the steps of a bucket's parameters."""

    tiles: list[StepTiles]
    sums: TileTables  # of the components without ``single`` tile, which are measured first; nothing to scale

    def to(self, device: torch.device) -> StepTables:
        """The same on a device."""
        tiles = [_step_tiles(some.kind, some.dims, upload(some.rows, device), len(some.rest)) for some in self.tiles]
        return StepTables(tiles, self.sums.to(device))

    def tensors(self) -> list[Tensor]:
        """What they consist of."""
        return [*(some.rows for some in self.tiles), *self.sums.tensors()]


def _step_tiles(kind: int, dims: int, rows: Tensor, several: int) -> StepTiles:
    return StepTiles(kind, dims, rows, rows[:several], rows[several:])


def build_step_tables(bucket: Bucket, grads: list[Tensor], kinds: list[int], column: list[int]) -> StepTables:
    """Cuts the gradients into tiles for a step of their parameters, whose memory layouts are the same.

    Args:
        bucket: of the gradients.
        grads: its gradients.
        kinds: of each gradient; those of a kind are stepped in one launch.
        column: of each gradient a number, which its rows will have.
    """
    owner, order = bucket.components, bucket.components.argsort(stable=True)
    pieces = _pieces(bucket, grads)
    is_single = has_single_tile(pieces, owner, bucket.count)
    sizes = torch.where(is_single[owner], SUM_TILE_BYTES, STEP_TILE_BYTES)
    cut = _cut(pieces.numels, sizes // pieces.itemsizes, order)
    piece, start, length = (each.flip(0) for each in cut)  # what was read last first, as in ``build_tables``
    gradient = pieces.gradients[piece]
    rows = pieces.rows(piece, start, length, owner, _int64(column)[gradient])
    tiles = [_step_tiles(*launch) for launch in pieces.launches(_int64(kinds)[gradient], rows, is_single)]
    return StepTables(tiles, _sum_tables(pieces, owner, order[~is_single[owner[order]]], is_single))


def has_single_tile(pieces: _Pieces, owner: Tensor, count: int) -> Tensor:
    """Of each component, whether one sum tile has all its elements, and it has any: bool [K]."""
    steps = SUM_TILE_BYTES // pieces.itemsizes
    return torch.zeros(count, dtype=torch.int64).index_add_(0, owner, (pieces.numels + steps - 1) // steps) == 1


def build_tables(bucket: Bucket, grads: list[Tensor]) -> TileTables:
    """Cuts the gradients into tiles, component by component, so that each component's partials lie together."""
    owner, order = bucket.components, bucket.components.argsort(stable=True)
    pieces = _pieces(bucket, grads)
    is_single = has_single_tile(pieces, owner, bucket.count)
    # What was read last is scaled first: it may still be in the cache.
    cut = _cut(pieces.numels, SCALE_TILE_BYTES // pieces.itemsizes, order)
    piece, start, length = (column.flip(0) for column in cut)
    rows = pieces.rows(piece, start, length, owner, pieces.dtype_of[piece])
    return replace(_sum_tables(pieces, owner, order, is_single), scale_tiles=pieces.tiles(rows, is_single)[::-1])


def _sum_tables(pieces: _Pieces, owner: Tensor, order: Tensor, is_single: Tensor) -> TileTables:
    """Of the pieces in ``order``, which has those of a component together; without scale tiles."""
    count = len(is_single)
    sum_bytes = torch.full((count,), SUM_TILE_BYTES)
    while True:
        piece, start, length = _cut(pieces.numels, sum_bytes[owner] // pieces.itemsizes, order)
        counts = owner[piece].bincount(minlength=count)
        coarser = (counts > CHUNK) & (sum_bytes < SCALE_TILE_BYTES)
        if not coarser.any():
            break
        sum_bytes[coarser] *= 2
    rows = pieces.rows(piece, start, length, owner, pieces.dtype_of[piece], torch.arange(len(piece)))
    components = (~is_single).nonzero()[:, 0]

    chunks, spans = None, _offsets(counts)
    if bool((counts > CHUNK).any()):
        component, _, merged = _cut(counts, torch.full((count,), CHUNK), torch.arange(count))
        chunks, spans = _offsets(merged), _offsets(component.bincount(minlength=count))

    return TileTables(len(rows), pieces.tiles(rows, is_single), [], pieces.layouts, chunks, spans, components)


@dataclass(frozen=True)
class _Pieces:
    """The m pieces of a bucket's gradients; columns are int64 [m]."""

    gradients: Tensor  # which gradient each is a piece of
    offsets: Tensor  # elements from that gradient's first to its own, 0 where ``layouts`` has it
    numels: Tensor
    itemsizes: Tensor
    places: Tensor  # where its layout begins in ``layouts``, -1 for a piece without gaps
    dims: int  # of layouts; 0 if there are none
    layouts: Tensor  # see ``TileTables``
    dtypes: tuple[torch.dtype, ...]
    dtype_of: Tensor  # which of them each piece has

    def rows(self, piece: Tensor, start: Tensor, length: Tensor, owner: Tensor, *more: Tensor) -> Tensor:
        """The rows of tiles, each part of a piece: gradient, start, length, component, layout, and these columns."""
        gradient, layout = self.gradients[piece], self.places[piece]
        return torch.stack((gradient, self.offsets[piece] + start, length, owner[piece], layout, *more), 1)

    def tiles(self, rows: Tensor, is_single: Tensor) -> list[Tiles]:
        """These tiles in one launch, those with gaps apart; ``is_single`` as in ``launches``."""
        launches = self.launches(torch.zeros_like(rows[:, 0]), rows, is_single)
        return [Tiles(self.dtypes, dims, own, several) for _, dims, own, several in launches]

    def launches(self, codes: Tensor, rows: Tensor, is_single: Tensor) -> Iterator[tuple[int, int, Tensor, int]]:
        """The rows of tiles with the same code, those with gaps apart.

        Args:
            codes: of the tiles.
            rows: of the tiles.
            is_single: of each component, whether it is one tile; these tiles come last.

        Yields:
            Code, dims of layouts, rows, and how many of these are of components of several tiles.
        """
        is_last = is_single[rows[:, 3]]
        for code in dict.fromkeys(codes.tolist()):
            for dims in sorted({0, self.dims}):
                own = (codes == code) & ((rows[:, 4] >= 0) == (dims > 0))
                if own.any():
                    several = rows[own & ~is_last]
                    yield code, dims, torch.cat((several, rows[own & is_last])), len(several)


def _pieces(bucket: Bucket, grads: list[Tensor]) -> _Pieces:
    boxes = bucket.slices if bucket.slices is not None else [(i, ()) for i in range(len(grads))]
    shapes = [(g.shape, g.stride()) for g in grads]  # a tensor's own are made anew each time they are asked for
    dtypes = tuple(dict.fromkeys(g.dtype for g in grads))
    gradients, offsets, numels, runs = [], [], [], []
    for i, box in boxes:
        sizes, strides = list(shapes[i][0]), shapes[i][1]
        for dim, _, size in box:
            sizes[dim] = size
        gradients.append(i)
        offsets.append(sum(start * strides[dim] for dim, start, _ in box))
        numels.append(math.prod(sizes))
        runs.append(_gaps(sizes, strides))
    dims = max(map(len, runs), default=0)
    layouts: list[int] = []
    places: list[int] = []
    for piece, run in enumerate(runs):
        places.append(len(layouts) if run else -1)
        if run:
            layouts += [offsets[piece], *(n for pair in run + [(1, 0)] * (dims - len(run)) for n in pair)]
            offsets[piece] = 0
    gradient = _int64(gradients)
    return _Pieces(
        gradient,
        _int64(offsets),
        _int64(numels),
        _int64([g.element_size() for g in grads])[gradient],
        _int64(places),
        dims,
        _int64(layouts or [0]),
        dtypes,
        _int64([dtypes.index(g.dtype) for g in grads])[gradient],
    )


def _int64(numbers: list[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64)


def _gaps(sizes: list[int], strides: tuple[int, ...]) -> list[tuple[int, int]]:
    """Size and stride of each dimension, innermost first, contiguous dimensions as one; empty without gaps."""
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
