"""K components, and the tensors or slices of tensors that belong to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from .naming import Aliases

Slice: TypeAlias = tuple[tuple[int, int, int], ...]  # (dim, start, size) of each dimension that is cut; () for all
Member: TypeAlias = tuple[int, int, Slice]  # (position of a tensor, its component, which slice of it)


@dataclass(frozen=True)
class Components:
    """K components and their members.

    Attributes:
        names: of the components, in order of first appearance; K = len(names).
        tensor_names: of the tensors, for error messages.
        members: every tensor or slice that belongs to a component, by position.
        problems: (position, error) of frozen parameters that a ``ComponentSpec`` can't cut or that can't be clipped:
            the error is raised as soon as they have a gradient.
        aliases: component names by other names of tied parameters.
        spellings: the K names with the prefix that parameters have lost; () if they haven't.
    """

    names: tuple[str, ...]
    tensor_names: tuple[str, ...]
    members: tuple[Member, ...]
    problems: tuple[tuple[int, str], ...] = ()
    aliases: Aliases = ()
    spellings: tuple[str, ...] = ()

    @property
    def clipped(self) -> set[int]:
        """Positions of the tensors that belong to a component, whole or in slices."""
        return {position for position, _, _ in self.members}

    @property
    def cut(self) -> set[int]:
        """Positions of the tensors of which slices are components."""
        return {position for position, _, place in self.members if place}

    def only(self, positions: Sequence[int]) -> Components:
        """The same components with these tensors alone."""
        new = {position: i for i, position in enumerate(positions)}
        return replace(
            self,
            tensor_names=tuple(self.tensor_names[i] for i in positions),
            members=tuple((new[i], component, place) for i, component, place in self.members if i in new),
            problems=tuple((new[i], problem) for i, problem in self.problems if i in new),
        )


def unclipped(tensor_names: Sequence[str], positions: Sequence[int]) -> Components:
    """The tensors at these positions as one component, for an update that reads them and doesn't clip."""
    return Components(("not clipped",), tuple(tensor_names), tuple((i, 0, ()) for i in positions))
