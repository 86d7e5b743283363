"""What can't be clipped in the backward pass: where a gradient isn't final, or not whole, when it arrives."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import type_name
from ..components.membership import Components
from ..components.parameters import NamedTensors, Parameters
from ..distributed.shards import is_dtensor, is_flattened

_WAY_OUT = "clip at the step instead: ComponentClipper.attach(optimizer)"


def check_parameters(parameters: Parameters, named: NamedTensors) -> None:
    """Raises for parameters whose gradients are averaged or gathered after their hooks.

    Raises:
        ValueError: names the parameter, or the module that does it.
    """
    _check_not_wrapped(parameters)
    for name, tensor in zip(named.names, named.tensors, strict=True):
        if tensor.requires_grad:
            check_whole(name, tensor)
            if not tensor.is_leaf:
                raise ValueError(
                    f"parameters: {name!r} is not a leaf: it was computed, and autograd gives it no gradient to clip"
                )
    if runs_on_several_ranks():
        own = set(map(id, named.tensors))
        culprit = averaging(lambda tensor: id(tensor) in own)
        if culprit is not None:
            raise ValueError(f"parameters: {averaged_by(culprit)}")


def _check_not_wrapped(parameters: Parameters) -> None:
    if not (isinstance(parameters, nn.Module) and torch.distributed.is_available()):
        return
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.nn.parallel import DistributedDataParallel

    for module in parameters.modules():
        if isinstance(module, DistributedDataParallel | FullyShardedDataParallel):
            raise ValueError(f"parameters: {averaged_by(type_name(module))}")


def averaged_by(wrapper: str) -> str:
    """What to tell of parameters in such a module."""
    return f"in a {wrapper} the backward pass sees local gradients, not yet averaged over ranks; {_WAY_OUT}"


def check_whole(name: str, tensor: Tensor) -> None:
    """Raises for a parameter of which this rank has a part."""
    if is_flattened(tensor):
        raise ValueError(
            f"parameters: FullyShardedDataParallel keeps a part of {name!r} on each rank, whose norm takes all "
            f"of them; {_WAY_OUT}"
        )
    if is_dtensor(tensor):
        raise ValueError(
            f"parameters: {name!r} is a DTensor, whose norm takes all its ranks. In the backward pass each "
            "gradient comes by itself, and perhaps not on every rank: they would wait for each other in vain. "
            "Clip at the step instead, with one all-reduce for all: ComponentClipper.attach(optimizer)"
        )


def check_separate(components: Components, trained: set[int]) -> None:
    """Raises for a component of which several parameters are trained.

    Raises:
        ValueError: names it.
    """
    owner: dict[int, int] = {}
    for position, component, _ in components.members:
        if position not in trained:
            continue
        first = owner.setdefault(component, position)
        if first != position:
            names = components.tensor_names
            raise ValueError(
                f"components: {components.names[component]!r} consists of several parameters ({names[first]!r}, "
                f"{names[position]!r}, ...), whose gradients are not final together; use components='parameter' or "
                "slices of parameters, or clip at the step: ComponentClipper.attach(optimizer)"
            )


# ------------------------------------------------------------------------------------------------------------
# Other ranks
# ------------------------------------------------------------------------------------------------------------


def runs_on_several_ranks() -> bool:
    """Whether there is anybody who could average gradients with us."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def averaging(is_ours: Callable[[Tensor], bool]) -> str | None:
    """The kind of a living ``DistributedDataParallel``, perhaps ``replicate``'s, that averages one of our gradients.

    It leaves no trace on the parameters, so all objects are looked through, 0.1 s and more. A handle looks at set-up,
    in its first pass, and in a few of those in which somebody has got hold of a parameter (``BackwardClipping``).
    """
    if not any(map(is_ours, _averaged())):
        return None
    gc.collect()  # it may be one that nobody has any more
    return "DistributedDataParallel" if any(map(is_ours, _averaged())) else None


def _averaged() -> Iterator[Tensor]:
    from torch.nn.parallel import DistributedDataParallel

    everything = gc.get_objects()
    # By type, not isinstance, which asks an object for its __class__; proxies may do anything then.
    kinds = {kind for kind in set(map(type, everything)) if issubclass(kind, DistributedDataParallel)}
    wrappers: list[Any] = [one for one in everything if type(one) in kinds] if kinds else []
    del everything
    for wrapper in wrappers:
        module = wrapper.__dict__.get("_modules", {}).get("module")  # none while it is being made
        if module is not None:
            ignored = getattr(wrapper, "parameters_to_ignore", ())
            yield from (parameter for name, parameter in module.named_parameters() if name not in ignored)
