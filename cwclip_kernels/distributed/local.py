"""What this rank holds of tensors and their gradients. Nothing here communicates."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parameter import is_lazy

from ..arguments import type_name
from ..components.membership import Components
from ..core.checks import WIDE_DTYPES, check_not_leaf
from .shards import LocalShard, is_dtensor

Shards = Sequence[LocalShard | None]  # one for each tensor; None for a plain tensor


def local_value(tensor: Any) -> Tensor:
    """The local tensor of a DTensor; a plain tensor as it is."""
    return tensor._local_tensor if is_dtensor(tensor) else tensor  # type: ignore[no-any-return]


def storage_of(tensor: Tensor) -> StorageWeakRef | None:
    """A weak reference to the memory of what this rank holds; None where there is no such thing."""
    local: Any = local_value(tensor)
    if type(local) not in (Tensor, nn.Parameter) or local.layout != torch.strided or local.is_nested:
        return None
    return StorageWeakRef(local.untyped_storage())  # type: ignore[no-untyped-call]


def is_trained(tensor: Tensor) -> bool:
    """Whether a gradient is to be expected; frozen parameters are neither measured nor counted."""
    return tensor.requires_grad or tensor.grad is not None


def member_numels(components: Components, tensors: Sequence[Tensor], shards: Shards | None = None) -> list[int]:
    """Number of elements of each member: of the whole parameter where there is a shard, else of the tensor."""
    found = []
    for position, _, part in components.members:
        shard, tensor = None if shards is None else shards[position], tensors[position]
        if shard is None and (is_lazy(tensor) or tensor.is_nested):
            found.append(0)
            continue
        shape = tensor.shape if shard is None else shard.shape
        sizes = {dim: size for dim, _, size in part}
        found.append(prod(sizes.get(dim, length) for dim, length in enumerate(shape)))
    return found


def is_wide(tensors: Sequence[Tensor]) -> bool:
    """Whether norms of their gradients are float64."""
    return any(t.dtype in WIDE_DTYPES and t.requires_grad for t in tensors)


class LocalGradients(NamedTuple):
    """What this rank holds of the gradients of one step."""

    local: list[Tensor | None]  # of each tensor's gradient; None if it has no gradient
    wrapped: Sequence[Tensor]  # the DTensors around them

    def check_not_leaves(self) -> None:
        """Raises ValueError if a DTensor that is to be written to is a parameter, or a leaf that requires grad."""
        for grad in self.wrapped:
            check_not_leaf(grad, "a gradient that is a DTensor")

    def touched(self) -> None:
        """Bumps the version counters of the DTensors; those of local tensors are bumped where they are written to."""
        if self.wrapped:
            torch.autograd.graph.increment_version(self.wrapped)


def gradients_of(tensors: Sequence[Tensor], shards: Shards) -> LocalGradients:
    """The local gradients of tensors; TypeError or ValueError if one isn't sharded as its parameter is."""
    local: list[Tensor | None] = []
    wrapped: list[Tensor] = []
    for tensor, shard in zip(tensors, shards, strict=True):
        grad: Any = tensor.grad
        if grad is None or shard is None:
            local.append(grad)
        elif shard.mesh is None:
            if grad.shape != shard.local_shape:
                raise ValueError(
                    f"the gradient of {shard.name!r} has shape {list(grad.shape)}, not that of this rank's shard "
                    f"({list(shard.local_shape)}); clip after the backward pass, outside of no_sync()"
                )
            local.append(grad)
        else:
            if shard.grad_spec is None or getattr(grad, "_spec", None) is not shard.grad_spec:
                _check_dtensor(grad, shard)
                shard.grad_spec = grad._spec
            part = grad._local_tensor
            # A collective may still be writing to an AsyncCollectiveTensor.
            local.append(part if type(part) is Tensor or not hasattr(part, "wait") else part.wait())
            wrapped.append(grad)
    return LocalGradients(local, wrapped)


def _check_dtensor(grad: Any, shard: LocalShard) -> None:
    if not is_dtensor(grad):
        raise TypeError(f"the gradient of {shard.name!r} is a {type_name(grad)}, but the parameter is a DTensor")
    if tuple(grad.placements) != shard.placements or grad.device_mesh != shard.mesh:
        raise ValueError(
            f"the gradient of {shard.name!r} has placements {tuple(grad.placements)}, but the parameter has "
            f"{shard.placements}; before clipping, p.grad = p.grad.redistribute(p.device_mesh, p.placements)"
        )
