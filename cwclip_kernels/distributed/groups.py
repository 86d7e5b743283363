"""Sets of ranks, and the few collectives that are asked of them. Thin over ``torch.distributed``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ..arguments import type_name


@dataclass(frozen=True)
class Group:
    """Some ranks, this one among them.

    Attributes:
        handle: their ``ProcessGroup``; the first of several if there is none for all at once.
        ranks: in its order, as the whole job numbers them.
        further: ``ProcessGroup``s to ask after the first, each with what came of the one before.
    """

    handle: Any
    ranks: tuple[int, ...]
    further: tuple[Any, ...] = ()

    @classmethod
    def of(cls, handle: Any) -> Group:
        """From a ``ProcessGroup``."""
        return cls(handle, tuple(dist.get_process_group_ranks(handle)))

    @property
    def order(self) -> tuple[object, ...]:
        """Before which others it is asked, on all ranks: small ones first, of a mesh one dimension after another.

        No two groups wait for each other then, and what is handed on from each to the next reaches all of the mesh.
        """
        return len(self.ranks), tuple(rank - self.ranks[0] for rank in self.ranks), self.ranks

    @property
    def here(self) -> int:
        """Where this rank is among ``ranks``."""
        return self.ranks.index(dist.get_rank())

    def gather(self, thing: object) -> list[Any]:
        """Everybody's, in the order of ``ranks`` where one group has all. Waits; for set-up and for errors only."""
        found = [thing]
        for handle in (self.handle, *self.further):
            if dist.get_backend(handle) == "fake":  # a stand-in for ranks that aren't there, to estimate memory
                return [thing] * len(self.ranks)
            theirs: list[Any] = [None] * dist.get_world_size(handle)
            dist.all_gather_object(theirs, found, group=handle)
            found = [one for some in theirs for one in some]
        return found

    def reduce(self, payload: Tensor, op: Any) -> Pending:
        """Starts an all-reduce, in place where the group serves the payload's device."""
        served = [device.type for device in getattr(self.handle, "_device_types", [])]
        sent = payload if not served or payload.device.type in served else payload.to(served[0])
        work = dist.all_reduce(sent, op, group=self.handle, async_op=True)
        for handle in self.further:
            work.wait()
            work = dist.all_reduce(sent, op, group=handle, async_op=True)
        return Pending(payload.device, sent, work)


@dataclass(frozen=True)
class Pending:
    """An all-reduce under way."""

    device: torch.device
    sent: Tensor
    work: Any

    def result(self) -> Tensor:
        """What came of it; on a GPU only the stream waits."""
        self.work.wait()
        return self.sent.to(self.device)


def check_parts(parameters: object, process_group: object) -> None:
    """Raises if these can't be parts (process_group), as every rank has all of them."""
    if process_group is not None and isinstance(parameters, nn.parallel.DistributedDataParallel):
        raise ValueError(
            "process_group: each rank has all gradients of a DistributedDataParallel, which would count once for "
            "each of them; leave it out"
        )


def as_group(value: object, name: str) -> Group | None:
    """A group as users give it; None if that is None or there is nobody else in it.

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
    if value is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(f"{name}: rank {dist.get_rank()} is not in this group")
    if not isinstance(value, dist.ProcessGroup):
        raise TypeError(f"{name}: expected a ProcessGroup or a DeviceMesh or None, not {type_name(value)}")
    group = Group.of(value)
    if dist.get_rank() not in group.ranks:
        raise ValueError(f"{name}: rank {dist.get_rank()} is not in this group")
    return group if len(group.ranks) > 1 else None


def group_over(mesh: Any, dims: Sequence[int]) -> Group | None:
    """The ranks that differ from this one in these dimensions of a mesh only; None if there are none.

    Several dimensions at once are one group, so that one collective serves them: one that exists, or one made for the
    purpose, at set-up, by its members alone. Where that can't be, they are asked one after another.
    """
    if prod(mesh.size(dim) for dim in dims) == 1:
        return None
    several = [dim for dim in dims if mesh.size(dim) > 1]
    if len(several) == 1:
        return Group.of(mesh.get_group(several[0]))
    coordinate = mesh.get_coordinate()
    place = tuple(slice(None) if dim in dims else coordinate[dim] for dim in range(mesh.ndim))
    ranks = tuple(sorted(mesh.mesh[place].flatten().tolist()))
    handle = _existing(ranks, mesh.device_type)
    if handle is None and _may_make_groups():
        handle = _made(ranks)
    if handle is not None:
        return Group.of(handle)
    first, *further = (mesh.get_group(dim) for dim in several)
    return Group(first, ranks, tuple(further))


def _existing(ranks: tuple[int, ...], device_type: str) -> Any:
    """A group of just these ranks that the program has made, of several the first by name; None if there is none."""
    if len(ranks) == dist.get_world_size():
        return dist.group.WORLD
    world = getattr(dist.distributed_c10d, "_world", None)
    known = {} if world is None else world.pg_group_ranks
    found = [
        handle
        for handle, members in known.items()
        if tuple(sorted(members)) == ranks
        and device_type in [device.type for device in getattr(handle, "_device_types", [])]
    ]
    return min(found, key=lambda handle: str(handle.group_name), default=None)


def _may_make_groups() -> bool:
    """Whether some ranks can make a group without the others.

    Where the first group is bound to a device, torch splits its communicator for each new group, which takes all
    ranks of the job at once; and so it does with TorchComms.
    """
    if getattr(dist.group.WORLD, "bound_device_id", None) is not None:
        return False
    uses_torchcomms = getattr(dist.distributed_c10d, "_use_torchcomms_enabled", None)
    return not (uses_torchcomms is not None and uses_torchcomms())


def along(mesh: Any) -> dict[tuple[int, ...], Group]:
    """The groups of this rank along each dimension of a mesh."""
    dims = range(mesh.ndim) if mesh.get_coordinate() is not None else ()
    groups = (group_over(mesh, [dim]) for dim in dims)
    return {group.ranks: group for group in groups if group is not None}


_made_for: tuple[object, dict[tuple[int, ...], Any]] = (None, {})


def _made(ranks: tuple[int, ...]) -> Any:
    global _made_for
    world = dist.group.WORLD
    if _made_for[0] is not world:  # torch.distributed was started anew
        _made_for = world, {}
    groups = _made_for[1]
    if ranks not in groups:
        groups[ranks] = dist.new_group(list(ranks), use_local_synchronization=True)
    return groups[ranks]
