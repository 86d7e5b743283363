"""Sets of ranks and their collectives: a thin layer over ``torch.distributed``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..arguments import type_name


@dataclass(frozen=True)
class RankGroup:
    """A set of ranks that includes this one."""

    # Their ProcessGroup; or, where no group has them all, several that are used one after another.
    handles: tuple[Any, ...]
    ranks: tuple[int, ...]  # global ranks, in the order of the group

    @classmethod
    def of(cls, handle: Any) -> RankGroup:
        """From a ``ProcessGroup``."""
        return cls((handle,), tuple(dist.get_process_group_ranks(handle)))

    @property
    def order(self) -> tuple[object, ...]:
        """Sort key for collectives: small groups first, then one dimension of a mesh after another.

        It is the same on all ranks, so that no two groups wait for each other, and what one group gathers reaches
        all ranks of the mesh through the next ones.
        """
        return len(self.ranks), tuple(rank - self.ranks[0] for rank in self.ranks), self.ranks

    def gather(self, value: object) -> list[Any]:
        """All ranks' values, in the order of ``ranks`` if there is one handle. Blocks: for set-up and errors only."""
        found = [value]
        for handle in self.handles:
            if dist.get_backend(handle) == "fake":  # simulates ranks that don't exist, to estimate memory
                return [value] * len(self.ranks)
            gathered: list[Any] = [None] * dist.get_world_size(handle)
            dist.all_gather_object(gathered, found, group=handle)
            found = [one for several in gathered for one in several]
        return found

    def reduce(self, payload: Tensor, op: Any) -> Callable[[], Tensor]:
        """Starts an all-reduce, in place where the group supports the payload's device.

        The function that it returns waits for the result; on a GPU only the stream waits.
        """
        supported = _device_types(self.handles[0])
        sent = payload if not supported or payload.device.type in supported else payload.to(supported[0])
        work: Any = None
        for handle in self.handles:
            if work is not None:
                work.wait()
            work = dist.all_reduce(sent, op, group=handle, async_op=True)

        def result() -> Tensor:
            work.wait()
            return sent.to(payload.device)

        return result


def in_order(groups: Iterable[RankGroup]) -> list[RankGroup]:
    """Each set of ranks once, by the same handle on all ranks and in the same order."""
    by_ranks = {group.ranks: group for group in sorted(groups, key=lambda group: str(group.handles[0].group_name))}
    return sorted(by_ranks.values(), key=lambda group: group.order)


def as_group(value: object, name: str) -> RankGroup | None:
    """The group that a user passed; None for None, and for a group of one rank.

    Raises:
        TypeError: neither a ``ProcessGroup`` nor a ``DeviceMesh`` nor None.
        ValueError: this rank is not in it, or a mesh of several dimensions.
    """
    if value is None:
        return None
    if not dist.is_available():
        raise ValueError(f"{name}: this build of torch has no torch.distributed")
    if isinstance(value, DeviceMesh):
        if value.ndim != 1:
            raise ValueError(f"{name}: expected a mesh of one dimension, not {value.ndim}; choose one: mesh['dp']")
        if value.get_coordinate() is None:
            raise ValueError(f"{name}: rank {dist.get_rank()} is not in this mesh")
        value = value.get_group()
    is_member = value is not dist.GroupMember.NON_GROUP_MEMBER
    if is_member and not isinstance(value, dist.ProcessGroup):
        raise TypeError(f"{name}: expected a ProcessGroup or a DeviceMesh or None, not {type_name(value)}")
    group = RankGroup.of(value) if is_member else None
    if group is None or dist.get_rank() not in group.ranks:
        raise ValueError(f"{name}: rank {dist.get_rank()} is not in this group")
    return group if len(group.ranks) > 1 else None


def group_over(mesh: Any, dims: Sequence[int]) -> RankGroup | None:
    """The ranks whose coordinates differ from this one's in these dimensions of a mesh only; None if there are none.

    Several dimensions become one group, so that one collective serves them: an existing group, or one made by its
    members alone, at set-up. Where that is impossible, the group has one handle for each dimension.
    """
    several = [dim for dim in dims if mesh.size(dim) > 1]
    if len(several) < 2:
        return RankGroup.of(mesh.get_group(several[0])) if several else None
    coordinate = mesh.get_coordinate()
    place = tuple(slice(None) if dim in dims else coordinate[dim] for dim in range(mesh.ndim))
    ranks = tuple(sorted(mesh.mesh[place].flatten().tolist()))
    handle = _existing(ranks, mesh.device_type)
    if handle is None and _may_make_groups():
        handle = _made(ranks)
    if handle is not None:
        return RankGroup.of(handle)
    return RankGroup(tuple(map(mesh.get_group, several)), ranks)


def groups_along(mesh: Any) -> dict[tuple[int, ...], RankGroup]:
    """This rank's groups along each dimension of a mesh, by their ranks; none if it is outside of the mesh."""
    dims = range(mesh.ndim) if mesh.get_coordinate() is not None else ()
    groups = (group_over(mesh, [dim]) for dim in dims)
    return {group.ranks: group for group in groups if group is not None}


def _device_types(handle: Any) -> list[str]:
    return [device.type for device in getattr(handle, "_device_types", [])]


def _existing(ranks: tuple[int, ...], device_type: str) -> Any:
    """A group of just these ranks that the program has made, of several the first by name; None if there is none."""
    if len(ranks) == dist.get_world_size():
        return dist.group.WORLD
    world = getattr(dist.distributed_c10d, "_world", None)
    known = {} if world is None else world.pg_group_ranks
    same = [handle for handle, members in known.items() if tuple(sorted(members)) == ranks]
    usable = [handle for handle in same if device_type in _device_types(handle)]
    return min(usable, key=lambda handle: str(handle.group_name), default=None)


def _may_make_groups() -> bool:
    """Whether some ranks can make a group without the others.

    If the default group is bound to a device, or with TorchComms, torch splits its communicator for each new group,
    which takes all ranks of the job.
    """
    if getattr(dist.group.WORLD, "bound_device_id", None) is not None:
        return False
    uses_torchcomms = getattr(dist.distributed_c10d, "_use_torchcomms_enabled", None)
    return not (uses_torchcomms is not None and uses_torchcomms())


_made_groups: WeakKeyDictionary[Any, dict[tuple[int, ...], Any]] = WeakKeyDictionary()  # by default group


def _made(ranks: tuple[int, ...]) -> Any:
    """A new group of these ranks, or the one that was made for them before."""
    groups = _made_groups.setdefault(dist.group.WORLD, {})
    if ranks not in groups:
        groups[ranks] = dist.new_group(list(ranks), use_local_synchronization=True)
    return groups[ranks]
