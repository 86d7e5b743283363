"""Set-up: the reduction plan of components whose parameters are sharded, once all ranks agree on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache

import torch.distributed as dist
from torch import Tensor

from ..components.membership import Components
from .consistency import compare, compare_stages, describe
from .groups import RankGroup, as_group, groups_along, in_order
from .local import Shards, is_wide
from .reduction_plan import ReductionPlan
from .shards import is_dtensor, is_flattened, shard_of


def plan_reductions(
    components: Components, tensors: Sequence[Tensor], process_group: object, pp_mesh: object, settings: str
) -> tuple[Components, ReductionPlan | None]:
    """Which sums are added up over which ranks; None if no other rank has anything to do with these tensors.

    Otherwise the ranks that share something make this call together and compare their components.

    Returns:
        The components, with the problems of frozen parameters that can't be clipped; and the plan.

    Raises:
        TypeError, ValueError: an argument of the wrong kind; parameters that can't be clipped, or ranks that differ,
            and then on all ranks.
    """
    group, stage_group = as_group(process_group, "process_group"), as_group(pp_mesh, "pp_mesh")
    shards = [shard_of(tensor, name) for tensor, name in zip(tensors, components.tensor_names, strict=True)]
    problems = list(_problems(components, tensors, shards, group))
    problem = next((text for position, text in problems if tensors[position].requires_grad), None)
    if group is None and stage_group is None and problem is None and not any(shards):
        return components, None
    frozen = [each for each in problems if not tensors[each[0]].requires_grad]
    components = replace(components, problems=(*components.problems, *frozen))

    # The groups along the dimensions of a mesh hold its replicas, too. No group is made before ranks agree: making
    # one takes all of its ranks.
    along = cache(groups_along)
    of_plain = {} if group is None else {group.ranks: group}
    nearby = [of_plain if shard is None or shard.mesh is None else along(shard.mesh) for shard in shards]
    neighbours = in_order({one for near in (of_plain, *nearby) for one in near.values()})
    stages = None
    if stage_group is None:
        # Frozen tensors that are neither sharded nor in a group may differ between ranks.
        chosen = [
            bool(near) or shard is not None or tensor.requires_grad
            for near, shard, tensor in zip(nearby, shards, tensors, strict=True)
        ]
        problem = compare(neighbours, describe(components, shards, chosen), settings, problem)
    else:
        for one in neighbours:  # these agree on what they share, and may have other parameters beside it
            found = compare([one], describe(components, shards, [one.ranks in near for near in nearby]))
            problem = problem or found
        stages = compare_stages(stage_group, components, is_wide(tensors))
        problem = compare([*neighbours, stage_group], {}, settings, problem or stages.problem)
    if problem is not None:
        raise ValueError(problem)
    return components, ReductionPlan(components, tensors, shards, group, neighbours, stages)


def _problems(
    components: Components, tensors: Sequence[Tensor], shards: Shards, group: RankGroup | None
) -> Iterator[tuple[int, str]]:
    """Position of each tensor that can't be clipped, perhaps on this rank alone, and the reason."""
    no_shard = "under ShardingStrategy.NO_SHARD, where each rank keeps all, use DistributedDataParallel instead"
    has_flattened = any(map(is_flattened, tensors))
    cut = components.cut
    for position, (name, tensor, shard) in enumerate(zip(components.tensor_names, tensors, shards, strict=True)):
        if shard is not None and shard.problem is not None:
            yield position, shard.problem
        elif is_flattened(tensor) and dist.get_world_size() > 1:
            if group is None:
                yield (
                    position,
                    f"parameters: FullyShardedDataParallel keeps a part of {name!r} on each rank; pass "
                    f"process_group=model.process_group ({no_shard})",
                )
            # A view of a flat parameter's shard has one dimension, and a flat shard is shorter than the whole.
            elif tensor.ndim > 1 or (shard is not None and shard.local_shape >= shard.shape):
                yield (
                    position,
                    f"parameters: {name!r} of FullyShardedDataParallel is whole here, while its gradient is "
                    f"sharded; leave summon_full_params() first ({no_shard})",
                )
        elif group is not None and has_flattened and not is_flattened(tensor) and not is_dtensor(tensor):
            yield (
                position,
                f"parameters: {name!r} isn't sharded by FullyShardedDataParallel, as others are, and would count "
                "several times in a sum over process_group; clip what it ignores in a call without process_group",
            )
        if group is not None and shard is None and position in cut:
            yield (
                position,
                f"components: {name!r} can't be cut: where this rank's part (process_group) lies in the whole is "
                "unknown; DTensors can be cut, and FullyShardedDataParallel with use_orig_params=False",
            )
