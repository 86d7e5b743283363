"""Set-up: the reduction plan of components whose parameters are sharded, once all ranks agree on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from hashlib import sha256
from typing import Any, TypeAlias

import torch.distributed as dist
from torch import Tensor

from ..arguments import some_of
from ..components.membership import Components
from .groups import RankGroup, as_group, groups_along, in_order
from .local import Shards, is_wide
from .partitions import Partitions
from .reduction_plan import ReductionPlan, compare_stages
from .shards import LocalShard, is_flat, is_flattened
from .units import as_units, repeated_on_ranks


def plan_reductions(
    components: Components,
    tensors: Sequence[Tensor],
    process_group: object,
    pp_mesh: object,
    settings: str,
    partitions: Partitions | None = None,
) -> tuple[Components, ReductionPlan | None]:
    """Which sums are added up over which ranks; None if this rank has all of these tensors for itself.

    Otherwise all ranks that share some of them call this together, and compare their components. ``partitions`` are
    given if an optimizer keeps the gradients of these tensors, which are then looked up there.

    Returns:
        The components, with the problems of frozen parameters that can't be clipped; and the plan.

    Raises:
        TypeError, ValueError: a wrong argument; on all ranks, if parameters can't be clipped or ranks differ.
    """
    units, names = as_units(process_group), components.tensor_names
    group, stage_group = as_group(units.explicit, "process_group"), as_group(pp_mesh, "pp_mesh")
    if partitions is None:
        shards, of_units = units.shards(tensors, names), units.problems(tensors, names)
    else:
        components, shards, of_units = partitions.laid_flat(components), partitions.shards(names), []
    cut, problem, frozen = components.cut, None, []
    for i, (name, tensor, shard) in enumerate(zip(names, tensors, shards, strict=True)):
        found = None if partitions is not None else of_units[i] or _problem(name, tensor, shard, i in cut, group)
        if found is not None and tensor.requires_grad:
            problem = problem or found
        elif found is not None:
            frozen.append((i, found))
    if group is None and stage_group is None and problem is None and not any(shards):
        return components, None
    components = replace(components, problems=(*components.problems, *frozen))

    # The groups along the dimensions of a mesh hold its replicas, too. No group is made before ranks agree: making
    # one takes all of its ranks.
    along = cache(groups_along)
    of_plain = {} if group is None else {group.ranks: group}
    nearby = [_groups_of(shard, along, of_plain) for shard in shards]
    neighbours = in_order({one for near in (of_plain, *nearby) for one in near.values()})
    stages = None
    if stage_group is None:
        # Frozen tensors that are neither sharded nor in a group may differ between ranks.
        chosen = [
            bool(near) or shard is not None or tensor.requires_grad
            for near, shard, tensor in zip(nearby, shards, tensors, strict=True)
        ]
        problem = _compare(neighbours, _described(components, shards, chosen), settings, problem)
    else:
        for one in neighbours:  # these agree on what they share, and may have other parameters beside it
            found = _compare([one], _described(components, shards, [one.ranks in near for near in nearby]))
            problem = problem or found
        stages = compare_stages(stage_group, components, is_wide(tensors))
        problem = _compare([*neighbours, stage_group], {}, settings, problem or stages.problem)
    if problem is None and partitions is None:
        problem = repeated_on_ranks(tensors, names, units)
    if problem is not None:
        raise ValueError(problem)
    return components, ReductionPlan(components, tensors, shards, group, neighbours, stages, partitions)


Groups: TypeAlias = Mapping[tuple[int, ...], RankGroup]  # by their ranks


def _groups_of(shard: LocalShard | None, along: Callable[[Any], Groups], of_plain: Groups) -> Groups:
    """The groups of ranks that have the same parameter, or other parts of it."""
    if shard is None:
        return of_plain
    if shard.mesh is not None:
        return along(shard.mesh)
    return {} if shard.group is None else {shard.group.ranks: shard.group}


def _problem(
    name: str, tensor: Tensor, shard: LocalShard | None, is_cut: bool, group: RankGroup | None
) -> str | None:
    """Why a tensor can't be clipped, perhaps on this rank alone."""
    if shard is not None and shard.problem is not None:
        return shard.problem
    if hasattr(tensor, "ds_id") or hasattr(tensor, "_hp_mapping"):
        return (
            f"parameters: {name!r} belongs to DeepSpeed, which keeps its gradient in partitions elsewhere; it would "
            "go unclipped; call cwclip_kernels.integrations.deepspeed.attach(engine, ...)"
        )
    is_view = shard is not None and is_flattened(tensor) and not is_flat(tensor)
    if is_cut and (is_view or (group is not None and shard is None)):
        return (
            f"components: {name!r} can't be cut: where this rank's part (process_group) lies in the whole is "
            "unknown; DTensors can be cut, and FullyShardedDataParallel with use_orig_params=False"
        )
    return None


# Of each component its parameters, and how each is sharded and cut.
Description: TypeAlias = Mapping[str, Sequence[str]]


def _described(components: Components, shards: Shards, chosen: Sequence[bool]) -> Description:
    """What ranks have to agree on: components with those of their parameters that are ``chosen``."""
    layouts = ["" if s is None else " ".join(("", str(list(s.shape)), *map(str, s.placements))) for s in shards]
    found: dict[str, list[str]] = {}
    for position, component, part in components.members:
        if chosen[position]:
            text = components.tensor_names[position] + layouts[position] + (f" cut {part}" if part else "")
            found.setdefault(components.names[component], []).append(text)
    return found


def _compare(
    groups: Sequence[RankGroup], description: Description, settings: str = "", problem: str | None = None
) -> str | None:
    """Compares all ranks that are in a group with this one, or with one that is, and so on.

    A rank with a ``problem`` takes part all the same, so that no other waits for it. The result is on all ranks the
    problem of one of them, or what differs between them, or None.
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


def _gather(groups: Sequence[RankGroup], value: Any) -> dict[int, Any]:
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
        if members != second[name]:
            shown = [", ".join((*each[:3], *["..."][: len(each) > 3])) for each in (members, second[name])]
            yield f"{name!r} is ({shown[0]}) on {one}, but ({shown[1]}) on {other}"
            return
    place, names = next((i, pair) for i, pair in enumerate(zip(first, second, strict=True)) if pair[0] != pair[1])
    yield f"they come in another order ({names[0]!r} and {names[1]!r} at place {place})"
