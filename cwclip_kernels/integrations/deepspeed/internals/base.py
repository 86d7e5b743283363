"""What DeepSpeed's optimizers have in common, and the check that they are as they were in the versions tried."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ....arguments import type_name
from ....components.parameters import NamedTensors
from ....components.spec import Grouping
from ....core.options import Options
from ....core.parameter_clipper import ParameterClipper
from ....core.partitioned_clipper import PartitionedClipper
from ....distributed.groups import RankGroup
from ....distributed.partitions import Fragment, Partitions
from ....thresholds.constant import MaxNorm

TRIED = "0.14.5 to 0.19.8"


class Steps(Protocol):
    """What is called in a step of DeepSpeed's optimizer."""

    def measure(self, loss_scale: float) -> Tensor:
        """Norm of all unscaled gradients together, [], if ``knows_total``."""

    def scale_(self, partition: int, gradient: Tensor) -> None:
        """Unscales and clips a partition's gradient in place."""

    def clip_(self, loss_scale: float) -> None:
        """Both, where each parameter has its own gradient."""

    @property
    def is_measured(self) -> bool:
        """Whether ``measure`` has been called in this step."""

    @property
    def knows_total(self) -> bool:
        """Whether what ``measure`` returns is DeepSpeed's global norm: of order 2, and of all parameters."""


class EngineOptimizer(ABC):
    """One of DeepSpeed's optimizers.

    Attributes:
        needs: attributes of it that are read.
        calls: methods that its ``step`` calls, each with its parameters, and that are replaced.
        looks_first: whether it looks for inf and NaN before anything is measured, and skips the step.
    """

    looks_first = False
    needs: tuple[str, ...] = ()
    calls: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def __init__(self, optimizer: Any, named: NamedTensors) -> None:
        self.optimizer, self.named = optimizer, named
        self._replaced: list[str] = []
        self._hooks: list[Any] = []
        for name in self.needs:
            if not hasattr(optimizer, name):
                raise RuntimeError(unknown(optimizer, f"it has no {name!r}"))
        called = names_in(type(optimizer).step)
        for name, arguments in self.calls:
            method = getattr(type(optimizer), name, None)
            found = tuple(inspect.signature(undecorated(method)).parameters) if callable(method) else ()
            if name not in called or found[1:] != arguments:
                raise RuntimeError(unknown(optimizer, f"its step() doesn't call {name}({', '.join(arguments)})"))
            if name in vars(optimizer):
                raise RuntimeError(
                    f"engine: {name} of its {type_name(optimizer)} is replaced already, by something else"
                )

    @abstractmethod
    def clipper(self, max_norm: MaxNorm, options: Options, components: Grouping) -> ParameterClipper:
        """What clips the gradients of this optimizer; all ranks call this together."""

    @abstractmethod
    def install(self, steps: Steps) -> None:
        """Replaces methods of the optimizer by ones that call ``steps``."""

    def _replace(self, name: str, ours: Callable[..., object]) -> None:
        setattr(self.optimizer, name, ours)
        self._replaced.append(name)

    def remove(self) -> None:
        """Puts everything back."""
        for name in self._replaced:
            vars(self.optimizer).pop(name, None)
        for hook in self._hooks:
            hook.remove()
        self._replaced, self._hooks = [], []

    def report(self, total: Tensor) -> None:
        """Makes this the global norm that the engine reports."""
        self.optimizer._global_grad_norm = total


def check_in_module(parameters: Iterable[Tensor], named: NamedTensors) -> None:
    """Raises ValueError for parameters of an optimizer that the engine's module doesn't have."""
    known = set(map(id, named.tensors))
    if any(id(parameter) not in known for parameter in parameters):
        raise ValueError(
            "engine: its optimizer has a parameter that its module doesn't have, and that would go unclipped; make "
            "it part of the module"
        )


def undecorated(function: Any) -> Any:
    """The function inside decorators, some of which (``instrument_w_nvtx``) don't say what they wrap."""
    while True:
        inner = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
        functions = [one for one in inner if inspect.isfunction(one)]
        if hasattr(function, "__wrapped__"):
            function = function.__wrapped__
        elif len(functions) == 1 and "args" in inspect.signature(function).parameters:
            function = functions[0]
        else:
            return function


def names_in(function: Any) -> tuple[str, ...]:
    """The attributes and global names that a function uses."""
    return undecorated(function).__code__.co_names  # type: ignore[no-any-return]


def unknown(optimizer: object, what: str) -> str:
    """The message about a version of DeepSpeed whose optimizer isn't as in those that were tried."""
    import deepspeed

    return (
        f"deepspeed {deepspeed.__version__}: {type_name(optimizer)} isn't as in the versions that this was made for "
        f"({TRIED}): {what}. Install one of those, or report it"
    )


class Flat(EngineOptimizer, Partitions):
    """An optimizer that keeps gradients in flat partitions."""

    def __init__(self, optimizer: Any, named: NamedTensors) -> None:
        super().__init__(optimizer, named)
        self.holder = f"DeepSpeed's {type_name(optimizer)}"
        self.shapes = [tuple(getattr(p, "ds_shape", p.shape)) for p in named.tensors]
        position = {id(p): i for i, p in enumerate(named.tensors)}
        fragments: list[Fragment | None] = [None] * len(position)
        found = list(self._fragments())
        check_in_module([parameter for parameter, _ in found], named)
        for parameter, fragment in found:
            fragments[position[id(parameter)]] = fragment
        self.fragments = fragments

    @abstractmethod
    def _fragments(self) -> Iterator[tuple[Tensor, Fragment]]:
        """Each of the optimizer's parameters, and what this rank holds of it."""

    @abstractmethod
    def _flat_gradient(self, partition: int) -> Tensor | None:
        """What is scaled, in the optimizer's own dtype."""

    @abstractmethod
    def _flat_values(self, partition: int) -> Tensor:
        """The optimizer's own parameters."""

    def gradients(self) -> list[Tensor | None]:
        """See ``Partitions``."""
        return self._narrowed(self._flat_gradient)

    def values(self) -> list[Tensor | None]:
        """See ``Partitions``."""
        return self._narrowed(lambda partition: self._flat_values(partition).detach())

    def _narrowed(self, flat_of: Callable[[int], Tensor | None]) -> list[Tensor | None]:
        flats: dict[int, Tensor | None] = {}
        found: list[Tensor | None] = []
        for fragment in self.fragments:
            flat = None
            if fragment is not None:
                if fragment.partition not in flats:
                    flats[fragment.partition] = flat_of(fragment.partition)
                flat = flats[fragment.partition]
            found.append(
                None if fragment is None or flat is None else flat.narrow(0, fragment.offset, fragment.numel)
            )
        return found

    def clipper(self, max_norm: MaxNorm, options: Options, components: Grouping) -> PartitionedClipper:
        """See ``EngineOptimizer``."""
        return PartitionedClipper(self.named, self, max_norm, options, components)


def fragments_of(
    groups: Sequence[Sequence[Tensor]],
    flats: Sequence[Tensor],
    process_groups: Sequence[Any],
    paddings: Sequence[Sequence[int]] | None = None,
) -> Iterator[tuple[Tensor, Fragment]]:
    """The parameters of each group, which lie end to end, each before its padding, and are cut into equal parts.

    ``flats`` are this rank's parts, one for each group.
    """
    paddings = [[0] * len(group) for group in groups] if paddings is None else paddings
    for i, (flat, process_group) in enumerate(zip(flats, process_groups, strict=True)):
        size, offset = flat.numel(), 0
        ranks, first = ranks_of(process_group), torch.distributed.get_rank(process_group) * size
        for parameter, padding in zip(groups[i], paddings[i], strict=True):
            start = min(max(first - offset, 0), parameter.numel())
            stop = min(max(first + size - offset, 0), parameter.numel())
            yield parameter, Fragment(start, stop - start, i, min(max(offset - first, 0), size), ranks)
            offset += parameter.numel() + padding


def ranks_of(process_group: Any) -> RankGroup | None:
    """A group of several ranks; None if it is only one."""
    group = RankGroup.of(process_group)
    return group if len(group.ranks) > 1 else None
