"""Parameters that can't be clipped in the backward pass: their gradients aren't complete when the hooks see them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import type_name
from ..distributed.elsewhere import check_model
from ..distributed.shards import is_dtensor, is_flattened

AT_THE_STEP = "clip at the step instead: ComponentClipper.attach(optimizer)"


def check_parameters(module: nn.Module | None, names: Sequence[str], tensors: Sequence[Tensor]) -> None:
    """Raises ValueError for parameters whose gradients other ranks add to after the hooks, or that have none."""
    if module is not None:
        check_model(module)
    for part in () if module is None else module.modules():
        # By name, so that nothing has to be imported.
        kinds = {kind.__name__ for kind in type(part).__mro__}
        if kinds & {"DistributedDataParallel", "FullyShardedDataParallel"}:
            raise ValueError(averaged_by(type_name(part)))
    for name, tensor in zip(names, tensors, strict=True):
        if tensor.requires_grad:
            check_whole(name, tensor)
            if not tensor.is_leaf:
                raise ValueError(f"parameters: {name!r} is not a leaf, so autograd gives it no gradient to clip")
    ids = set(map(id, tensors))
    if runs_on_several_ranks() and are_averaged(lambda tensor: id(tensor) in ids):
        raise ValueError(averaged_by("DistributedDataParallel"))


def check_whole(name: str, tensor: Tensor) -> None:
    """Raises ValueError for a parameter of which this rank has only a part."""
    if is_flattened(tensor):
        raise ValueError(
            f"parameters: FullyShardedDataParallel keeps a part of {name!r} on each rank, whose norm takes all "
            f"of them; {AT_THE_STEP}"
        )
    if is_dtensor(tensor):
        raise ValueError(
            f"parameters: {name!r} is a DTensor, whose norm takes an all-reduce. In the backward pass each parameter "
            f"would need its own, and ranks whose gradients come in another order would deadlock; {AT_THE_STEP}, "
            "with one all-reduce for all"
        )


def averaged_by(wrapper: str) -> str:
    """The error for parameters in a module of this type."""
    return f"parameters: in a {wrapper} the backward pass sees local gradients, not averaged ones; {AT_THE_STEP}"


def runs_on_several_ranks() -> bool:
    """Whether gradients may be averaged over ranks at all."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def are_averaged(is_ours: Callable[[Tensor], bool]) -> bool:
    """Whether an existing ``DistributedDataParallel``, perhaps ``replicate``'s, averages one of our gradients.

    It leaves no trace on the parameters, so this searches all objects, which takes 0.1 s or more.
    """
    found = any(map(is_ours, _averaged()))
    if found:
        gc.collect()  # it may be one that nothing refers to any more
    return found and any(map(is_ours, _averaged()))


def _averaged() -> Iterator[Tensor]:
    from torch.nn.parallel import DistributedDataParallel

    # By type, not isinstance, which asks an object for its __class__; proxies may do anything then.
    found: list[Any] = [one for one in gc.get_objects() if issubclass(type(one), DistributedDataParallel)]
    for wrapper in found:
        module = wrapper.__dict__.get("_modules", {}).get("module")  # not there yet while it is being made
        if module is not None:
            ignored = getattr(wrapper, "parameters_to_ignore", ())
            yield from (parameter for name, parameter in module.named_parameters() if name not in ignored)
