"""Power sums of the same components on several ranks, added up by one all-reduce, exactly and with NaN.

What is sent depends on the order p of the norm:

    p >= 0      the sums: SUM
    p < 0       each sum, and beside it 1 if the component has elements, otherwise 0: SUM
    p = inf     the largest: MAX. Backends lose a NaN among floats, so the bits are compared as integers: those of
                numbers >= 0 have the same order, and NaN is above inf
    p = -inf    the smallest: MAX of integers in the opposite order; -1, below all of them, for "no elements"
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..backends.memory import upload
from .groups import RankGroup

_BITS = {torch.float64: torch.int64, torch.float32: torch.int32}


def encode(sums: Tensor, has_elements: Tensor | None, norm_type: float) -> Tensor:
    """Power sums [n] in the form in which ranks combine them: [n], or [n, 2] for finite p < 0.

    ``has_elements`` is bool [n], and is needed for p < 0 only.
    """
    if not math.isinf(norm_type):
        return sums if has_elements is None else torch.stack((sums, has_elements.to(sums.dtype)), 1)
    kind = _BITS[sums.dtype]
    bits = torch.where(sums.isnan(), math.nan, sums).abs().view(kind)
    if norm_type > 0:
        return bits
    top = torch.iinfo(kind).max
    bits = torch.where(sums.isnan(), top, top - 1 - bits)
    return bits if has_elements is None else torch.where(has_elements, bits, -1)


def decode(encoded: Tensor, dtype: torch.dtype, norm_type: float) -> Tensor:
    """Power sums [n] from what ``encode`` made of them; of components without elements those whose root is 0."""
    if not math.isinf(norm_type):
        return encoded if norm_type >= 0 else torch.where(encoded[:, 1] > 0, encoded[:, 0], math.inf)
    if norm_type > 0:
        return encoded.view(dtype)
    top = torch.iinfo(encoded.dtype).max
    sums = torch.where(encoded == -1, 0.0, (top - 1 - encoded).view(dtype))
    return torch.where(encoded == top, math.nan, sums)


class Indices:
    """Indices, int64, copied to each device once."""

    def __init__(self, indices: Sequence[Any]) -> None:
        self.host = torch.tensor(indices, dtype=torch.int64, device="cpu")
        self._on: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        """The indices on a device; no host sync."""
        if device not in self._on:
            self._on[device] = upload(self.host, device)
        return self._on[device]


class Reduction:
    """Adds up rows, each of one component, over ranks and then by component.

    Args:
        groups: sets of ranks, each with the rows that it adds up, in an order that its ranks share. ``len(owners)``
            is the row of a component that other ranks have and this one hasn't.
        owners: the component of each row.
        count: number of components.
    """

    def __init__(self, groups: Sequence[tuple[RankGroup, list[int]]], owners: Sequence[int], count: int) -> None:
        self.groups = [(group, Indices(rows)) for group, rows in groups]
        is_one_to_one = list(owners) == list(range(count))
        self.is_local = is_one_to_one and not groups
        # The group that adds up all rows as they are, if it is so.
        self.single = groups[0][0] if is_one_to_one and [r for _, r in groups] == [list(range(count))] else None
        self._owners = None if is_one_to_one else Indices(owners)
        # Where each row's sum is found in one list: of the rows here, a neutral one, and what each group returns.
        places, end = list(range(len(owners))), len(owners) + 1
        for _, rows in groups:
            lanes = {row: end + lane for lane, row in enumerate(rows)}
            places = [lanes.get(row, place) for row, place in enumerate(places)]
            end += len(rows)
        merged: list[list[int]] = [[] for _ in range(count)]
        for owner, place in zip(owners, places, strict=True):
            merged[owner].append(place)
        self._merged = Indices([*zip_longest(*merged, fillvalue=len(owners))] or [()])

    def over_ranks(self, encoded: Tensor, norm_type: float) -> Tensor:
        """The encoded sums of all components, from those of rows. All ranks of the groups call this together."""
        operation = dist.ReduceOp.MAX if math.isinf(norm_type) else dist.ReduceOp.SUM
        if self.single is not None:
            return self.single.reduce(encoded, operation)()
        if self.is_local:
            return encoded
        neutral = encoded.new_full((1, *encoded.shape[1:]), -1 if norm_type == -math.inf else 0)
        rows = torch.cat((encoded, neutral))
        started = [group.reduce(rows[own.on(rows.device)], operation) for group, own in self.groups]
        rows = torch.cat((rows, *[result() for result in started]))[self._merged.on(rows.device)]
        return rows.amax(0) if math.isinf(norm_type) else rows.sum(0)

    def to_local(self, values: Tensor) -> Tensor:
        """The value of each row's component, from those of all components."""
        return values if self._owners is None else values[self._owners.on(values.device)]
