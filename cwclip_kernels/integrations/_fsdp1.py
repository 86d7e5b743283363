"""Which ranks ``FullyShardedDataParallel`` has spread parameters over: trainers know their models, not that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..components.parameters import NamedTensors, Parameters, named_tensors
from ..distributed.groups import RankGroup
from ..distributed.shards import is_flattened

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def without_whole_frozen(parameters: Parameters) -> tuple[Parameters, list[Tensor]]:
    """Splits off what is frozen and whole beside what is sharded: none of it is clipped while that is so.

    ``FullyShardedDataParallel`` around some modules alone leaves the others whole.

    Args:
        parameters: as for ``fused_component_clip_``; no iterator, which would be used up.

    Returns:
        The others, or all as given if there is nothing to split off; and what was, which can't be clipped with them
        should it learn later.
    """
    named = named_tensors(parameters)
    left_out: list[Tensor] = []
    if any(map(is_flattened, named.tensors)):
        left_out = [p for p in named.tensors if not (p.requires_grad or is_flattened(p))]
    if not left_out:
        return parameters, []
    kept = [(n, p) for n, p in zip(named.names, named.tensors, strict=True) if p.requires_grad or is_flattened(p)]
    return kept if named.named else [p for _, p in kept], left_out


def group_of(parameters: NamedTensors, models: Sequence[nn.Module], whose: str) -> ProcessGroup | None:
    """The ranks over which ``FullyShardedDataParallel`` has spread these parameters; None if it hasn't.

    Args:
        parameters: all that are to be clipped in one call.
        models: where to look for who shards them.
        whose: what kind of models these are, for errors: "prepared by this accelerator".

    Raises:
        ValueError: that isn't the same for all of them, or can't be told.
    """
    sharded = {id(t) for t in parameters.tensors if is_flattened(t)}
    if not sharded:
        return None
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy  # slow to import

    for name, tensor in zip(parameters.names, parameters.tensors, strict=True):
        if id(tensor) not in sharded:
            raise ValueError(
                f"parameters: {name!r} is whole on each rank, and others are sharded by FullyShardedDataParallel; "
                "wrap what has it, too, or clip what is whole in a call of its own"
            )
    owners = []
    for model in models:
        roots = FullyShardedDataParallel.fsdp_modules(model, root_only=True)
        own = [root for root in roots if not sharded.isdisjoint(map(id, root.parameters()))]
        if own:
            owners.append(own)
    if not owners:
        raise ValueError(f"parameters: no model {whose} has them; pass process_group")
    if len(owners) > 1:
        raise ValueError(f"parameters: they belong to {len(owners)} prepared models; clip each in a call of its own")
    if any(root.sharding_strategy is ShardingStrategy.NO_SHARD for root in owners[0]):
        return None  # the engine says what to do instead
    groups = {RankGroup.of(root.process_group).ranks: root.process_group for root in owners[0]}
    if len(groups) > 1:
        raise ValueError(
            f"parameters: they are sharded over {len(groups)} different sets of ranks; clip each in a call of "
            "its own, with its process_group"
        )
    return next(iter(groups.values()))
