"""What the units of ``FullyShardedDataParallel`` (FSDP1) say about their parameters: which ranks share each of them.

A unit is one of its modules, with a flat parameter and a ``ShardingStrategy``. Units of one model may have different
strategies and process groups. A flat parameter or a view of it alone doesn't say any of this.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from .elsewhere import check_model
from .groups import RankGroup, as_group
from .shards import LocalShard, is_dtensor, is_flat, is_flattened, shard_of


@dataclass(frozen=True)
class Held:
    """What this rank holds of a parameter of a unit.

    Attributes:
        group: the ranks that hold the other elements; None if each has all, as with ``NO_SHARD``. Of
            ``HYBRID_SHARD`` those over which it shards, and not their replicas.
        numel: number of elements of the original parameter; 0 for a flat parameter.
        start: index of the first one held here; of an original parameter.
        length: how many are held here; of an original parameter.
        problem: why its gradient can't be clipped.
    """

    group: RankGroup | None
    numel: int = 0
    start: int = 0
    length: int = 0
    problem: str | None = None


@dataclass(frozen=True)
class Units:
    """The parameters of models' units, by id; it keeps none of them alive.

    Attributes:
        held: by (id, what is held), in the models' order.
        explicit: the ``process_group`` that the user passed; each unit that shards has to have the same.
    """

    held: tuple[tuple[int, Held], ...] = ()
    explicit: Any = None

    @property
    def is_needed(self) -> bool:
        """Whether parameters alone, as in a copy, wouldn't tell as much."""
        return bool(self.held) and dist.get_world_size() > 1

    def shards(self, tensors: Sequence[Tensor], names: Sequence[str]) -> list[LocalShard | None]:
        """What this rank holds of each tensor: DTensors, too. None if that is all, or if nothing is known of it."""
        held, group = dict(self.held), as_group(self.explicit, "process_group")
        return [
            _shard(tensor, name, held.get(id(tensor)), group) for tensor, name in zip(tensors, names, strict=True)
        ]

    def problems(self, tensors: Sequence[Tensor], names: Sequence[str]) -> list[str | None]:
        """Why parameters of FSDP1, and whole ones beside them, can't be clipped; None for all others."""
        if not any(map(is_flattened, tensors)) or dist.get_world_size() == 1:
            return [None] * len(tensors)
        held, group = dict(self.held), as_group(self.explicit, "process_group")
        return [
            self._problem(tensor, name, held.get(id(tensor)), group)
            for tensor, name in zip(tensors, names, strict=True)
        ]

    def _problem(self, tensor: Tensor, name: str, held: Held | None, group: RankGroup | None) -> str | None:
        if not is_flattened(tensor):
            if group is None or is_dtensor(tensor):
                return None
            return (
                f"parameters: {name!r} isn't sharded by FullyShardedDataParallel, as others are, and would count "
                "several times in a sum over process_group; pass the module that it returned, without process_group, "
                "or clip what it ignores in a call of its own"
            )
        if held is None:
            if group is None:
                return (
                    f"parameters: FullyShardedDataParallel keeps a part of {name!r} on each rank; pass the module "
                    "that it returned, which knows which ranks share what, or process_group=model.process_group"
                )
            if tensor.ndim > 1 or (is_flat(tensor) and _is_whole(tensor)):
                return _whole_here(name)
            return None
        if held.problem is not None:
            return held.problem.format(name)
        if self.explicit is not None:
            given = (dist.get_rank(),) if group is None else group.ranks
            if held.group is None and group is not None:
                return (
                    f"process_group: each rank has all of {name!r}, as with ShardingStrategy.NO_SHARD, which would "
                    "count several times in a sum over process_group; leave it out"
                )
            if held.group is not None and given != held.group.ranks:
                return (
                    f"process_group: {name!r} is sharded over ranks {list(held.group.ranks)}, not over "
                    f"{list(given)}; leave it out, since FullyShardedDataParallel knows its own"
                )
        is_whole = held.group is not None and not is_flat(tensor) and tuple(tensor.shape) != (held.length,)
        return _whole_here(name) if is_whole else None


def _whole_here(name: str) -> str:
    return (
        f"parameters: {name!r} of FullyShardedDataParallel is whole here. If its gradient is sharded, leave "
        "summon_full_params() first; if it isn't (ShardingStrategy.NO_SHARD), pass the module that "
        "FullyShardedDataParallel returned, without process_group"
    )


def _is_whole(flat: Any) -> bool:
    return bool(flat._sharded_size.numel() >= flat._unpadded_unsharded_size.numel())


def _shard(tensor: Tensor, name: str, held: Held | None, group: RankGroup | None) -> LocalShard | None:
    if held is None or is_dtensor(tensor):
        shard = shard_of(tensor, name)
        if shard is not None and shard.mesh is None:
            shard.group = group
        return shard
    if held.group is None:
        return None
    if not is_flat(tensor):
        return LocalShard(name, (held.numel,), {0: ((held.start, held.length),)}, group=held.group)
    shard = shard_of(tensor, name)
    assert shard is not None
    shard.group = held.group
    return shard


def units_of(models: Iterable[nn.Module], explicit: object = None) -> Units:
    """The units of models; none where ``FullyShardedDataParallel`` was never imported."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", None)
    if kind is None or not dist.is_initialized():
        return Units(explicit=explicit)
    held: dict[int, Held] = {}
    for unit in (unit for model in models for unit in kind.fsdp_modules(model)):
        if unit._handle is not None:
            held.update(_held_by(unit._handle, unit.process_group))
    return Units(tuple(held.items()), explicit)


def _held_by(handle: Any, process_group: Any) -> dict[int, Held]:
    flat, group = handle.flat_param, RankGroup.of(process_group)
    shared = group if handle.uses_sharded_strategy and len(group.ranks) > 1 else None
    problem = None
    if any(extension is not None for extension in flat._param_extensions):
        problem = (
            "parameters: {!r} lies in a unit of FullyShardedDataParallel with tensor-parallel parameters, of which "
            "it doesn't know the other parts; shard with fully_shard (FSDP2) instead"
        )
    found = {id(flat): Held(shared, problem=problem)}
    for parameter, shape, info in zip(flat._params or (), flat._shapes, flat._shard_param_infos, strict=False):
        start, length = (info.intra_param_start_idx, info.numel_in_shard) if info.in_shard else (0, 0)
        found[id(parameter)] = Held(shared, prod(shape), start, length, problem)
    return found


def known_group(parameters: object, process_group: object) -> Any:
    """What is known of who shares ``parameters``: their units with the user's group; just that if they have no units.

    Raises:
        ValueError: ``process_group`` is given for gradients of which every rank has all; or as ``check_model``.
    """
    if isinstance(process_group, Units) or not isinstance(parameters, nn.Module):
        return process_group
    check_model(parameters)
    if process_group is not None and isinstance(parameters, nn.parallel.DistributedDataParallel):
        raise ValueError(
            "process_group: each rank has all gradients of a DistributedDataParallel, which would count once for "
            "each of them; leave it out"
        )
    units = units_of([parameters], process_group)
    return units if units.held else process_group


def each_by_itself(tensors: Iterable[Tensor]) -> Units:
    """For parameters whose norms nobody asks for: what this rank holds of them is all that counts."""
    return Units(tuple((id(tensor), Held(None)) for tensor in tensors))


def as_units(process_group: object) -> Units:
    """What ``known_group`` returned, as units, perhaps none."""
    return process_group if isinstance(process_group, Units) else Units(explicit=process_group)


def repeated_on_ranks(tensors: Sequence[Tensor], names: Sequence[str], units: Units) -> str | None:
    """Whether ranks have the same of a view of a flat parameter whose unit is unknown, which would count twice.

    All ranks of the process group call this together. A view of one dimension may be a part; or, with ``NO_SHARD``
    and in replicas of ``HYBRID_SHARD``, the same on several ranks.
    """
    group, known = as_group(units.explicit, "process_group"), dict(units.held)
    asked = [
        (name, tensor)
        for name, tensor in zip(names, tensors, strict=True)
        if is_flattened(tensor) and not is_flat(tensor) and id(tensor) not in known
    ]
    if group is None or not asked:
        return None
    looks = group.gather([_look(tensor) for _, tensor in asked])
    for (name, _), *theirs in zip(asked, *looks, strict=True):
        holders: dict[object, list[int]] = {}
        for rank, look in zip(group.ranks, theirs, strict=True):
            if look is not None:
                holders.setdefault(look, []).append(rank)
        if holders and all(len(ranks) > 1 for ranks in holders.values()):  # as copies come; parts may look alike, too
            one, other = next(iter(holders.values()))[:2]
            return (
                f"parameters: ranks {one} and {other} hold the same of {name!r}, as with ShardingStrategy.NO_SHARD "
                "or between replicas, so it would count twice in a sum over process_group; pass the module that "
                "FullyShardedDataParallel returned, without process_group"
            )
    return None


def _look(tensor: Tensor) -> object:
    """What tells parts of one parameter from copies: place, size and first elements; None if it has no elements."""
    if not tensor.numel():
        return None
    first = tensor.detach().reshape(-1)[:64].double().tolist()
    return tensor.storage_offset(), tensor.numel(), repr(first)
