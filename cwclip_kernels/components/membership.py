"""K components and which tensors, or slices of tensors, belong to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from .naming import Aliases

Slice: TypeAlias = tuple[tuple[int, int, int], ...]  # (dim, start, size) of each dimension that is cut; () for all
Member: TypeAlias = tuple[int, int, Slice]  # position of a tensor, the component it belongs to, and which slice of it


@dataclass(frozen=True)
class Components:
    """K components and their members.

    Attributes:
        names: name of each component, in order of first appearance; K = len(names).
        tensor_names: name of each tensor, for error messages.
        members: every tensor or slice that belongs to a component, by position.
        problems: position of a frozen parameter that can't be clipped as it is, or cut by a ``ComponentSpec``, and
            the reason: the error that is raised as soon as it has a gradient.
        aliases: names that components would have by other names of tied parameters, each with the one that counts.
        spellings: names that components would have if the parameters' had kept the prefix that they lost, each with
            the one that counts; patterns may be written for them.
    """

    names: tuple[str, ...]
    tensor_names: tuple[str, ...]
    members: tuple[Member, ...]
    problems: tuple[tuple[int, str], ...] = ()
    aliases: Aliases = ()
    spellings: Aliases = ()

    @property
    def clipped(self) -> set[int]:
        """Positions of the tensors that belong to a component, whole or in slices."""
        return {position for position, _, _ in self.members}

    @property
    def cut(self) -> set[int]:
        """Positions of the tensors whose slices belong to components of their own."""
        return {position for position, _, place in self.members if place}

    def only(self, positions: Sequence[int]) -> Components:
        """The same components, and of the tensors these alone."""
        new = {position: i for i, position in enumerate(positions)}
        return Components(
            self.names,
            tuple(self.tensor_names[i] for i in positions),
            tuple((new[i], component, place) for i, component, place in self.members if i in new),
            tuple((new[i], problem) for i, problem in self.problems if i in new),
            self.aliases,
            self.spellings,
        )
