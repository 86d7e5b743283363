"""K components and which tensors, or slices of tensors, belong to them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from .naming import Aliases

Box: TypeAlias = tuple[tuple[int, int, int], ...]  # a slice of a tensor: (dim, start, size) of each dim that is cut

LEFT_ALONE = -1  # component index of a tensor that a callable answered None for
CUT = -2  # of one whose slices belong to components of their own


@dataclass(frozen=True)
class Components:
    """K components and who belongs to them.

    Attributes:
        names: name of each component, in order of first appearance; K = len(names).
        index: component of each tensor, ``LEFT_ALONE`` for none, ``CUT`` where ``slices`` say more.
        tensor_names: name of each tensor, for error messages.
        slices: position among the tensors, component and place of every slice of those that are cut, in order.
        problems: position of a frozen parameter that can't be clipped as it is, or cut by a ``ComponentSpec``, and
            the reason: the error that is raised as soon as it has a gradient.
        aliases: names that components would have by other names of tied parameters, each with the one that counts.
        spellings: names that components would have if the parameters' had kept the prefix that they lost, each with
            the one that counts; patterns may be written for them.
    """

    names: tuple[str, ...]
    index: tuple[int, ...]
    tensor_names: tuple[str, ...]
    slices: tuple[tuple[int, int, Box], ...] = ()
    problems: tuple[tuple[int, str], ...] = ()
    aliases: Aliases = ()
    spellings: Aliases = ()

    def only(self, positions: Sequence[int]) -> Components:
        """The same components, and of the tensors these alone."""
        place = {position: i for i, position in enumerate(positions)}
        return Components(
            self.names,
            tuple(self.index[i] for i in positions),
            tuple(self.tensor_names[i] for i in positions),
            tuple((place[i], component, box) for i, component, box in self.slices if i in place),
            tuple((place[i], problem) for i, problem in self.problems if i in place),
            self.aliases,
            self.spellings,
        )

    def members(self) -> Iterator[tuple[int, int, Box]]:
        """Position, component and place of every tensor or slice that belongs to a component, in order."""
        slices = iter(self.slices)
        upcoming = next(slices, None)
        for position, component in enumerate(self.index):
            if component >= 0:
                yield position, component, ()
            while upcoming is not None and upcoming[0] == position:
                yield upcoming
                upcoming = next(slices, None)
