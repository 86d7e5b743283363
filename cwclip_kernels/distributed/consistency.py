"""Set-up: ranks that share components compare what they mean by them. Waits for all of them; done once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import TypeVar

import torch.distributed as dist

from ..arguments import some_of
from .groups import Group

T = TypeVar("T")

# Of each component its parameters, and how each is held, in words that are the same on all ranks that agree.
Statement = Mapping[str, Sequence[tuple[str, str]]]


def agree(
    groups: Sequence[Group], statement: Statement, problem: ValueError | None = None, settings: str = ""
) -> None:
    """Compares the components of all ranks that are in a group with this one, or with one that is, and so on.

    Args:
        groups: in an order that all ranks share.
        statement: this rank's.
        problem: what this rank has found wrong already; of which the others hear, rather than wait for it.
        settings: other arguments, in words.

    Raises:
        ValueError: on all of them. What one rank found wrong; or else, with the same message, what differs.
    """
    own = list(statement.items())  # their order is that of the sums
    said = _from_all(groups, (sha256(repr(own).encode()).hexdigest(), settings, problem and str(problem)))
    if problem is not None:
        raise problem
    for rank, (_, _, theirs) in said.items():
        if theirs is not None:
            raise ValueError(f"on rank {rank}: {theirs}")
    if not said:
        return
    first, (digest, theirs, _) = next(iter(said.items()))
    for rank, (other_digest, others, _) in said.items():
        if others != theirs:
            raise ValueError(f"arguments differ between ranks: {theirs} on rank {first}, but {others} on rank {rank}")
        if other_digest != digest:  # all ranks find the same two, and hear these alone: there may be thousands
            statements = _from_all(groups, own if dist.get_rank() in (first, rank) else None)
            raise ValueError(_difference(first, dict(statements[first] or ()), rank, dict(statements[rank] or ())))


def _from_all(groups: Sequence[Group], thing: T) -> dict[int, T]:
    """Everybody's, by rank. Nobody leaves before the last group was asked, whatever was found."""
    found = {dist.get_rank(): thing} if groups else {}
    for group in groups:
        for theirs in group.gather(found):
            found.update(theirs)
    return dict(sorted(found.items()))


def _difference(rank: int, first: Statement, other: int, second: Statement) -> str:
    return (
        f"components: ranks {rank} and {other} don't have the same: "
        f"{_what(first, second, f'rank {rank}', f'rank {other}')}. Every rank has to pass the same parameters with "
        "the same components (ranks that hold different ones: pp_mesh)"
    )


def _what(first: Statement, second: Statement, one: str, two: str) -> str:
    parts = []
    for theirs, others, rank in ((first, second, one), (second, first, two)):
        missing = [name for name in theirs if name not in others]
        if missing:
            parts.append(f"only {rank} has {some_of(missing)}")
    if parts:
        return ", ".join(parts)
    for name, members in first.items():
        if list(members) != list(second[name]):
            return f"{name!r} is {_members(members)} on {one}, but {_members(second[name])} on {two}"
    place = next(i for i, (a, b) in enumerate(zip(first, second, strict=True)) if a != b)
    return f"they come in another order ({list(first)[place]!r} and {list(second)[place]!r} at place {place})"


def _members(members: Sequence[tuple[str, str]]) -> str:
    shown = ", ".join(f"{name} {how}".strip() for name, how in members[:3])
    return f"({shown}{', ...' if len(members) > 3 else ''})"


@dataclass(frozen=True)
class Stages:
    """What ranks with different parameters have in common.

    Attributes:
        group: these ranks.
        names: all of their components, each once.
        parameters: names of all of their parameters.
        spanning: those that several ranks have a part of, in an order that is the same everywhere.
        counted_elsewhere: those of them that an earlier rank has.
        is_wide: whether any parameter anywhere is float64.
    """

    group: Group
    names: tuple[str, ...]
    parameters: tuple[str, ...]
    spanning: tuple[str, ...]
    counted_elsewhere: frozenset[str]
    is_wide: bool


def compare_stages(
    group: Group, members: Mapping[str, Sequence[str]], parameters: Sequence[str], is_wide: bool
) -> Stages:
    """Finds out which components several ranks have a part of; the others need no traffic.

    A component that is the same single parameter on several ranks is not one of them: either it is tied, and each
    has all of its gradient, or each means its own by that name (``pipelining`` numbers each stage from 0).

    Args:
        group: stages of a pipeline, or ranks with different experts.
        members: of each component here the names of its parameters.
        parameters: names of all parameters here.
        is_wide: whether any parameter here is float64.

    Raises:
        ValueError: on all ranks, if a component of several parameters has the same one on two ranks.
    """
    found = group.gather((dict(members), tuple(parameters), is_wide))
    holders: dict[str, list[int]] = {}
    for i, (theirs, _, _) in enumerate(found):
        for name in theirs:
            holders.setdefault(name, []).append(i)
    spanning = []
    for name, own in holders.items():
        parts = [list(found[i][0][name]) for i in own]
        if len(own) == 1 or all(part == parts[0] and len(part) == 1 for part in parts):
            continue
        seen: dict[str, int] = {}
        for i, part in zip(own, parts, strict=True):
            for parameter in part:
                if parameter in seen:
                    raise ValueError(
                        f"pp_mesh: ranks {group.ranks[seen[parameter]]} and {group.ranks[i]} both have a parameter "
                        f"{parameter!r} in component {name!r}, which would count twice; pass (name, parameter) pairs "
                        "with the names of the whole model, a tied parameter on one rank only, or clip what all "
                        "ranks have in a call of its own"
                    )
                seen[parameter] = i
        spanning.append(name)
    me = group.here
    return Stages(
        group,
        tuple(holders),
        tuple(dict.fromkeys(name for _, names, _ in found for name in names)),
        tuple(spanning),
        frozenset(name for name in spanning if me in holders[name] and holders[name][0] != me),
        any(wide for _, _, wide in found),
    )
