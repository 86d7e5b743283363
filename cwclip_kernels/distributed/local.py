"""This rank's share: its part of components, of parameters and of gradients. Nothing is communicated."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from ..arguments import type_name
from ..components.membership import Components, Member
from ..core.checks import check_not_leaf
from .groups import Group
from .shards import Layout, is_dtensor

Layouts = Sequence[Layout | None]

# ------------------------------------------------------------------------------------------------------------
# Components
# ------------------------------------------------------------------------------------------------------------


def local_components(
    components: Components, layouts: Layouts, groups: Sequence[Group | None]
) -> tuple[Components, list[tuple[int, Group | None]]]:
    """What is held here, as components, and of each the component that it is part of, and its group."""
    place: dict[tuple[int, tuple[int, ...] | None], int] = {}
    owners: list[tuple[int, Group | None]] = []
    members: list[Member] = []
    for position, component, box in components.members:
        group, layout = groups[position], layouts[position]
        key = component, None if group is None else group.ranks
        if key not in place:
            place[key] = len(owners)
            owners.append((component, group))
        parts = [box] if layout is None or not box else layout.local(box)
        members += [(position, place[key], part) for part in parts]
    names = tuple(components.names[component] for component, _ in owners)
    local = Components(names, components.tensor_names, tuple(members), components.problems)
    return local, owners


def cut_parts(components: Components, layouts: Layouts) -> list[tuple[int, ValueError]]:
    """Parts (process_group) that are cut: position of each and what is wrong with that."""
    cut = dict.fromkeys(position for position, _, box in components.members if box and layouts[position] is None)
    return [
        (
            position,
            ValueError(
                f"components: {components.tensor_names[position]!r} can't be cut, as it is a part (process_group) "
                "whose place in the whole is unknown; a DTensor can be, and FullyShardedDataParallel's with "
                "use_orig_params=False"
            ),
        )
        for position in cut
    ]


def statement(
    components: Components, layouts: Layouts, chosen: Sequence[bool] | None = None
) -> dict[str, list[tuple[str, str]]]:
    """What ranks must agree on: of each component its parameters (or those chosen) and how they are sharded."""

    @cache  # a tensor may be cut into thousands
    def how(position: int) -> str:
        layout = layouts[position]
        if layout is None:
            return ""
        return f"{list(layout.shape)} {' '.join(map(str, layout.placements))}".strip()

    found: dict[str, list[tuple[str, str]]] = {}
    for position, component, box in components.members:
        if chosen is not None and not chosen[position]:
            continue
        members = found.setdefault(components.names[component], [])
        members.append((components.tensor_names[position], f"{how(position)} cut {box}" if box else how(position)))
    return found


def member_numels(components: Components, tensors: Sequence[Tensor], layouts: Layouts | None = None) -> list[int]:
    """Elements of each member: all of DTensors and flat parameters, and those that are here of plain tensors."""
    found = []
    for position, _, box in components.members:
        layout, tensor = None if layouts is None else layouts[position], tensors[position]
        if layout is None and (is_lazy(tensor) or tensor.is_nested):
            found.append(0)
            continue
        shape = tuple(tensor.shape) if layout is None else layout.shape
        sizes = {dim: size for dim, _, size in box}
        found.append(prod(sizes.get(dim, length) for dim, length in enumerate(shape)))
    return found


# ------------------------------------------------------------------------------------------------------------
# Gradients
# ------------------------------------------------------------------------------------------------------------


def local_value(tensor: Any) -> Tensor:
    """What is held here of a tensor."""
    local: Tensor = tensor._local_tensor if is_dtensor(tensor) else tensor
    return local


class Held(NamedTuple):
    """Gradients of one step.

    Attributes:
        local: of each tensor what is held here, None if it has no gradient.
        wrapped: the DTensors around them.
    """

    local: list[Tensor | None]
    wrapped: Sequence[Tensor]

    def check_not_leaves(self) -> None:
        """Raises ValueError where a DTensor that is to be written to is a parameter, or a leaf that requires grad."""
        for grad in self.wrapped:
            check_not_leaf(grad, "a gradient that is a DTensor")

    def touched(self) -> None:
        """Tells autograd that the DTensors were written to; of their local tensors it has been told."""
        if self.wrapped:
            torch.autograd.graph.increment_version(self.wrapped)


class Share:
    """Finds this rank's part of gradients.

    Args:
        layouts: of the parameters.
        names: theirs.
    """

    def __init__(self, layouts: Layouts, names: Sequence[str]) -> None:
        self._layouts = layouts
        self._names = names
        # How the last gradient found in order was laid out: the same object at every step, with FSDP2.
        self._specs: list[Any] = [None] * len(layouts)

    def gradients(self, tensors: Sequence[Tensor]) -> Held:
        """What is held here of each tensor's gradient.

        Raises:
            TypeError, ValueError: a gradient that isn't held as its parameter is; names the parameter.
        """
        local: list[Tensor | None] = []
        wrapped: list[Tensor] = []
        for position, (tensor, spec) in enumerate(zip(tensors, self._specs, strict=True)):
            grad: Any = tensor.grad
            layout = self._layouts[position]
            if grad is None or layout is None:
                local.append(grad)
            elif layout.mesh is None:
                _check_flat(grad, layout, self._names[position])
                local.append(grad)
            else:
                if spec is None or getattr(grad, "_spec", None) is not spec:
                    _check_dtensor(grad, layout, self._names[position])
                    self._specs[position] = grad._spec
                part = grad._local_tensor
                local.append(part if type(part) is Tensor else _arrived(part))
                wrapped.append(grad)
        return Held(local, wrapped)


def _check_flat(grad: Tensor, layout: Layout, name: str) -> None:
    if grad.shape != layout.local_shape:
        raise ValueError(
            f"the gradient of {name!r} has shape {list(grad.shape)}, not that of this rank's part "
            f"({list(layout.local_shape)}); clip after the backward pass, outside of no_sync()"
        )


def _check_dtensor(grad: Any, layout: Layout, name: str) -> None:
    if not is_dtensor(grad):
        raise TypeError(f"the gradient of {name!r} is a {type_name(grad)}, but the parameter is a DTensor")
    if tuple(grad.placements) != layout.placements or grad.device_mesh != layout.mesh:
        raise ValueError(
            f"the gradient of {name!r} has placements {tuple(grad.placements)}, but the parameter has "
            f"{layout.placements}; before clipping, p.grad = p.grad.redistribute(p.device_mesh, p.placements)"
        )


def _arrived(local: Any) -> Tensor:
    """A local tensor that a collective may still be writing to."""
    wait = getattr(local, "wait", None)
    arrived: Tensor = wait() if wait is not None else local
    return arrived
