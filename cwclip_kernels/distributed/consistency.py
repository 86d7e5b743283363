"""Set-up: ranks check that they mean the same by the components that they share. All of them call this together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from typing import TypeAlias, TypeVar

import torch.distributed as dist

from ..arguments import some_of
from ..components.membership import Components
from .groups import RankGroup
from .local import Shards

T = TypeVar("T")

# Of each component its parameters, and how each is sharded and cut, as text.
Description: TypeAlias = Mapping[str, Sequence[tuple[str, str]]]


def describe(components: Components, shards: Shards, chosen: Sequence[bool]) -> Description:
    """What ranks have to agree on: components with those of their parameters that are ``chosen``."""

    @cache  # a tensor may be cut into thousands
    def layout(position: int) -> str:
        shard = shards[position]
        return "" if shard is None else f"{list(shard.shape)} {' '.join(map(str, shard.placements))}".strip()

    found: dict[str, list[tuple[str, str]]] = {}
    for position, component, part in components.members:
        if chosen[position]:
            how = f"{layout(position)} cut {part}" if part else layout(position)
            found.setdefault(components.names[component], []).append((components.tensor_names[position], how))
    return found


def compare(
    groups: Sequence[RankGroup], description: Description, settings: str = "", problem: str | None = None
) -> str | None:
    """Compares all ranks that are in a group with this one, or with one that is, and so on.

    Args:
        groups: in the same order on all ranks.
        description: of this rank's components.
        settings: other arguments, as text.
        problem: what this rank has found wrong before; it takes part so that no other rank waits for it.

    Returns:
        None on all ranks if all is well; else on all ranks why not: what one of them found wrong, or what differs.
    """
    own = list(description.items())  # in the order in which sums are sent
    reports = _gather(groups, (sha256(repr(own).encode()).hexdigest(), settings, problem))
    if problem is not None or not reports:
        return problem
    for rank, (_, _, theirs) in reports.items():
        if theirs is not None:
            return f"on rank {rank}: {theirs}"
    first, (digest, expected, _) = next(iter(reports.items()))
    for rank, (other_digest, others, _) in reports.items():
        if others != expected:
            return f"arguments differ between ranks: {expected} on rank {first}, but {others} on rank {rank}"
        if other_digest != digest:  # all ranks find the same two; only these send their descriptions, which are long
            sent = _gather(groups, own if dist.get_rank() in (first, rank) else None)
            one, other = (dict(sent[i] or ()) for i in (first, rank))
            return (
                f"components: ranks {first} and {rank} don't have the same: "
                f"{', '.join(_differences(one, other, f'rank {first}', f'rank {rank}'))}. Every rank has to pass the "
                "same parameters with the same components (for ranks with different ones: pp_mesh)"
            )
    return None


def _gather(groups: Sequence[RankGroup], value: T) -> dict[int, T]:
    """All ranks' values, by rank. Goes through all groups on every rank, whatever was found."""
    found = {dist.get_rank(): value} if groups else {}
    for group in groups:
        for theirs in group.gather(found):
            found.update(theirs)
    return dict(sorted(found.items()))


def _differences(first: Description, second: Description, one: str, other: str) -> Iterator[str]:
    for own, others, rank in ((first, second, one), (second, first, other)):
        missing = [name for name in own if name not in others]
        if missing:
            yield f"only {rank} has {some_of(missing)}"
    if first.keys() != second.keys():
        return
    for name, members in first.items():
        if list(members) != list(second[name]):
            yield f"{name!r} is {_shown(members)} on {one}, but {_shown(second[name])} on {other}"
            return
    place, names = next((i, pair) for i, pair in enumerate(zip(first, second, strict=True)) if pair[0] != pair[1])
    yield f"they come in another order ({names[0]!r} and {names[1]!r} at place {place})"


def _shown(members: Sequence[tuple[str, str]]) -> str:
    shown = ", ".join(f"{name} {how}".strip() for name, how in members[:3])
    return f"({shown}{', ...' if len(members) > 3 else ''})"


@dataclass(frozen=True)
class Stages:
    """The components of ranks with different parameters, such as the stages of a pipeline.

    Attributes:
        group: these ranks.
        names: of the components of all ranks.
        parameters: names of the parameters of all ranks.
        shared: names of the components that have parameters on several ranks, in the same order everywhere.
        counted_elsewhere: those of them that an earlier rank has, too, and counts in the total norm.
        is_wide: whether any parameter of any rank is float64.
        problem: what is wrong with them, the same on all ranks.
    """

    group: RankGroup
    names: tuple[str, ...]
    parameters: tuple[str, ...]
    shared: tuple[str, ...]
    counted_elsewhere: frozenset[str]
    is_wide: bool
    problem: str | None


def compare_stages(group: RankGroup, components: Components, is_wide: bool) -> Stages:
    """Finds out which components have parameters on several ranks; the others need no communication.

    A component that is the same single parameter on several ranks is not one of them: either it is tied, and each
    has all of its gradient, or they are different ones of one name (``pipelining`` numbers each stage from 0).
    """
    members: dict[str, dict[str, None]] = {}
    for position, component, _ in components.members:
        members.setdefault(components.names[component], {})[components.tensor_names[position]] = None
    found = group.gather((members, components.tensor_names, is_wide))
    holders: dict[str, list[int]] = {}
    for i, (theirs, _, _) in enumerate(found):
        for name in theirs:
            holders.setdefault(name, []).append(i)
    shared, problem = [], None
    for name, own in holders.items():
        parts = [found[i][0][name] for i in own]
        if len(own) == 1 or all(part == parts[0] and len(part) == 1 for part in parts):
            continue
        shared.append(name)
        seen: dict[str, int] = {}
        for i, parameter in ((i, parameter) for i, part in zip(own, parts, strict=True) for parameter in part):
            if seen.setdefault(parameter, i) != i and problem is None:
                problem = (
                    f"pp_mesh: ranks {group.ranks[seen[parameter]]} and {group.ranks[i]} both have a parameter "
                    f"{parameter!r} in component {name!r}, which would count twice; pass (name, parameter) pairs "
                    "with the names of the whole model, a tied parameter on one rank only, or clip what all "
                    "ranks have in a call of its own"
                )
    here = group.ranks.index(dist.get_rank())
    return Stages(
        group,
        tuple(holders),
        tuple(dict.fromkeys(name for _, names, _ in found for name in names)),
        tuple(shared),
        frozenset(name for name in shared if here in holders[name][1:]),
        any(wide for _, _, wide in found),
        problem,
    )
