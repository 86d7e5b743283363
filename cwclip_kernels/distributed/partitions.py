"""Gradients that an optimizer keeps in flat partitions, one of each on every rank, as DeepSpeed's ZeRO does.

A partition is one tensor with one dimension, in which fragments of parameters lie end to end, perhaps with padding
between them. Where a parameter is cut has nothing to do with its shape.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from math import prod

from torch import Tensor

from ..components.membership import Components, Member
from .groups import RankGroup
from .shards import LocalShard, flat_range


@dataclass(frozen=True)
class Fragment:
    """What this rank holds of a parameter laid flat: elements from ``start`` on, which may be none.

    Attributes:
        start: index of the first one in the parameter.
        numel: how many.
        partition: number of the partition in which they lie.
        offset: index of the first one there.
        group: the ranks that hold the other elements; None if this rank holds all.
    """

    start: int
    numel: int
    partition: int
    offset: int
    group: RankGroup | None = None


class Partitions(ABC):
    """Parameters by position, and where an optimizer keeps what this rank holds of their gradients.

    Attributes:
        shapes: of the whole parameters.
        fragments: of each parameter; None if the optimizer doesn't have it, such as a frozen one.
        holder: who keeps them, for messages.
    """

    shapes: Sequence[tuple[int, ...]]
    fragments: Sequence[Fragment | None]
    holder: str

    @abstractmethod
    def gradients(self) -> list[Tensor | None]:
        """The fragments of all gradients as they are before the step, [numel] each; they are only read."""

    @abstractmethod
    def values(self) -> list[Tensor | None]:
        """The fragments of all parameters, [numel] each, as the optimizer keeps them."""

    def shards(self, names: Sequence[str]) -> list[LocalShard | None]:
        """The same for whoever adds up sums over ranks."""
        return [
            None if f is None else LocalShard(n, (prod(s),), {0: ((f.start, f.numel),)}, group=f.group)
            for n, s, f in zip(names, self.shapes, self.fragments, strict=True)
        ]

    def laid_flat(self, components: Components) -> Components:
        """Components whose slices are of parameters laid flat; ValueError if one isn't contiguous there."""
        members: list[Member] = []
        for position, component, part in components.members:
            if part and self.fragments[position] is not None:
                name, shape = components.tensor_names[position], self.shapes[position]
                part = ((0, *flat_range(part, shape, name, self.holder)),)
            members.append((position, component, part))
        return replace(components, members=tuple(members))

    def components_in(self, partition: int, local: Components, left_out: Collection[int] = ()) -> Components:
        """Those of what this rank holds (``ReductionPlan.local``) in one partition, as slices of that one tensor.

        Parameters ``left_out``, by position, are one more, the last: they are unscaled, and not clipped.
        """
        names = (*local.names, "not clipped") if left_out else local.names
        unclipped = [(position, len(local.names), ()) for position in sorted(left_out)]
        found: list[tuple[int, int, int]] = []  # component, start and size
        for position, component, part in (*local.members, *unclipped):
            fragment = self.fragments[position]
            if fragment is None or fragment.partition != partition:
                continue
            start, size = (part[0][1], part[0][2]) if part else (0, fragment.numel)
            if size:
                found.append((component, fragment.offset + start, size))
        found.sort(key=lambda one: one[1])
        joined: list[tuple[int, int, int]] = []  # of one component, side by side
        for component, start, size in found:
            if joined and joined[-1][0] == component and joined[-1][1] + joined[-1][2] == start:
                joined[-1] = component, joined[-1][1], joined[-1][2] + size
            else:
                joined.append((component, start, size))
        members = tuple((0, component, ((0, start, size),)) for component, start, size in joined)
        return Components(names, (f"partition {partition}",), members)
