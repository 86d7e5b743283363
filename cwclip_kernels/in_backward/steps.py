"""Stepping one parameter at a time, as soon as its gradient is clipped."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import FunctionType
from typing import Any, Protocol, TypeAlias

from torch import Tensor
from torch.optim import LBFGS, Optimizer

from ..arguments import type_name
from ..components.parameters import NamedTensors
from ..core.optimizers import attached_clippers, inside_of, parameters_of, runs_hooks

Optimizers: TypeAlias = "Optimizer | Mapping[Tensor, Optimizer]"

_AT_THE_STEP = "clip at the step instead (ComponentClipper.attach(optimizer))"
_ONE_EACH = "give each parameter an optimizer of its own: optimizer={p: Optimizer([p], ...) for p in parameters}"

# What a subclass may define without changing what a step of one parameter does.
_HARMLESS = {
    *("__init__", "__module__", "__doc__", "__qualname__", "__annotations__", "__annotate_func__", "__parameters__"),
    *("__repr__", "__slots__", "__dict__", "__weakref__", "__static_attributes__", "__firstlineno__", "__hash__"),
    *("__getstate__", "__setstate__", "state_dict", "load_state_dict", "zero_grad", "add_param_group"),
}


class Steps(Protocol):
    """Steps parameters one by one."""

    def begin(self) -> None:
        """Called before a backward pass's first gradient; raises if the optimizer isn't any more what it was."""

    def step_of(self, parameter: Tensor) -> Callable[[], None] | None:
        """What steps this parameter; None if it isn't the optimizer's."""

    def parameters(self) -> Iterable[Tensor]:
        """All that it steps."""


def steps_of(optimizer: object, named: NamedTensors) -> Steps:
    """Steps by this optimizer, or by one for each parameter.

    Raises:
        TypeError, ValueError: one that can't be right when it steps one parameter after the other.
    """
    if isinstance(optimizer, Optimizer):
        _check_not_wrapper(optimizer, "")
        _check_not_attached(optimizer, named)
        return _GroupSteps(optimizer, named)
    if isinstance(optimizer, Mapping):
        return _OwnSteps(optimizer, named)
    raise TypeError(
        "optimizer: expected a torch.optim.Optimizer, a mapping of parameters to optimizers, or None, not "
        f"{type_name(optimizer)}{inside_of(optimizer)}"
    )


class _GroupSteps:
    """One optimizer for many parameters: for each step it is left one group of one parameter."""

    def __init__(self, optimizer: Optimizer, named: NamedTensors) -> None:
        _check_no_closure(optimizer)
        _check_steps_one_by_one(optimizer)
        self._optimizer = optimizer
        self._outline: list[tuple[int, int, int]] = []
        self._places: dict[int, tuple[dict[str, Any], int]] = {}
        self.begin()
        if not any(id(tensor) in self._places for tensor in named.tensors):
            raise ValueError("optimizer: owns none of the parameters")

    def begin(self) -> None:
        _check_own_step(self._optimizer)
        groups = self._optimizer.param_groups
        # Groups are added by add_param_group, and replaced by load_state_dict.
        outline = [(id(group), id(group["params"]), len(group["params"])) for group in groups]
        if outline != self._outline:
            self._look_up()
            self._outline = outline

    def parameters(self) -> Iterable[Tensor]:
        return parameters_of(self._optimizer)

    def _look_up(self) -> None:
        groups = self._optimizer.param_groups
        self._places = {id(p): (group, i) for group in groups for i, p in enumerate(group["params"])}

    def step_of(self, parameter: Tensor) -> Callable[[], None] | None:
        place = self._places.get(id(parameter))
        if place is not None and not _is_at(place, parameter):  # a list was changed in place
            self._look_up()
            place = self._places.get(id(parameter))
        return None if place is None else partial(self._step, place[0], parameter)

    def _step(self, group: dict[str, Any], parameter: Tensor) -> None:
        optimizer = self._optimizer
        # A copy, of the group as it is now: torch's optimizers write nothing to their groups in a step.
        kept, optimizer.param_groups = optimizer.param_groups, [{**group, "params": [parameter]}]
        try:
            optimizer.step()
        finally:
            optimizer.param_groups = kept


def _is_at(place: tuple[dict[str, Any], int], parameter: Tensor) -> bool:
    group, i = place
    return i < len(group["params"]) and group["params"][i] is parameter


class _OwnSteps:
    """An optimizer for each parameter, of any class: what it counts, it counts for that parameter."""

    def __init__(self, optimizers: Mapping[Any, Any], named: NamedTensors) -> None:
        names = dict(zip(map(id, named.tensors), named.names, strict=True))
        self._optimizers: dict[int, tuple[str, Optimizer]] = {}
        for parameter, optimizer in optimizers.items():
            if not isinstance(parameter, Tensor):
                raise TypeError(f"optimizer: the keys of a mapping are parameters, not {type_name(parameter)}")
            name = names.get(id(parameter))
            if name is None:
                raise ValueError(
                    f"optimizer: a key of shape {list(parameter.shape)} is none of the parameters, and would never "
                    "be stepped"
                )
            if not isinstance(optimizer, Optimizer):
                raise TypeError(
                    f"optimizer: expected a torch.optim.Optimizer for {name!r}, not {type_name(optimizer)}"
                )
            _check_not_wrapper(optimizer, f" for {name!r}")
            _check_not_attached(optimizer, named)
            _check_no_closure(optimizer)
            if not _owns_exactly(optimizer, parameter):
                raise ValueError(
                    f"optimizer: the one for {name!r} must own that parameter and no other: Optimizer([p], ...)"
                )
            self._optimizers[id(parameter)] = name, optimizer
        if not self._optimizers:
            raise ValueError("optimizer: a mapping of no parameter")

    def begin(self) -> None:
        pass

    def parameters(self) -> Iterable[Tensor]:
        return [p for _, optimizer in self._optimizers.values() for p in parameters_of(optimizer)]

    def step_of(self, parameter: Tensor) -> Callable[[], None] | None:
        found = self._optimizers.get(id(parameter))
        if found is None:
            return None
        name, optimizer = found
        if not _owns_exactly(optimizer, parameter):
            raise RuntimeError(f"optimizer: the one for {name!r} doesn't own that parameter alone any more")
        return partial(_step, optimizer)


def _step(optimizer: Optimizer) -> None:
    optimizer.step()


def _owns_exactly(optimizer: Optimizer, parameter: Tensor) -> bool:
    groups = optimizer.param_groups
    return len(groups) == 1 and len(groups[0]["params"]) == 1 and groups[0]["params"][0] is parameter


# ------------------------------------------------------------------------------------------------------------
# Which optimizers treat each parameter by itself
# ------------------------------------------------------------------------------------------------------------


def _check_not_wrapper(optimizer: Optimizer, whose: str) -> None:
    inner = "" if runs_hooks(optimizer) else inside_of(optimizer)
    if inner:
        raise TypeError(
            f"optimizer: expected a torch.optim.Optimizer{whose}, not a {type_name(optimizer)}, which wraps one; "
            f"pass the optimizer inside{inner}"
        )


def _check_not_attached(optimizer: Optimizer, named: NamedTensors) -> None:
    too = attached_clippers(optimizer, named.tensors)
    if too:
        raise ValueError(
            f"optimizer: a clipper that was attached to it (ComponentClipper.attach) clips {too[0][1]!r} as well; "
            "remove() that one's handle, or don't call clip_in_backward"
        )


def _check_no_closure(optimizer: Optimizer) -> None:
    parameters = list(inspect.signature(type(optimizer).step).parameters.values())[1:]
    variadic = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    needed = [p.name for p in parameters if p.default is inspect.Parameter.empty and p.kind not in variadic]
    if isinstance(optimizer, LBFGS) or needed:
        wants = "all gradients at once" if isinstance(optimizer, LBFGS) else f"{needed[0]!r} at its step"
        raise ValueError(f"optimizer: {type_name(optimizer)} needs {wants}; {_AT_THE_STEP}")


def _check_steps_one_by_one(optimizer: Optimizer) -> None:
    """torch.optim's own keep all that they count with the parameter; of others nobody knows."""
    kind = type(optimizer)
    changed = next((f"{owner.__module__}.{owner.__qualname__}.{name}" for owner, name in _overrides(kind)), None)
    if changed is None and not _is_torchs(kind.step):
        changed = f"{kind.__module__}.{kind.__qualname__}.step"
    if changed is not None:
        raise ValueError(
            f"optimizer: {changed} is not torch.optim's own. Called once for each parameter, it may count a step "
            "each time (what an optimizer keeps in its groups) or miss the other parameters (statistics over several "
            f"of them). Either {_ONE_EACH}; or {_AT_THE_STEP}"
        )


def _overrides(kind: type) -> list[tuple[type, str]]:
    """What classes that aren't torch's change of those that are."""
    lineage = kind.__mro__
    torchs = [c for c in lineage if c is not object and c.__module__.split(".")[:2] == ["torch", "optim"]]
    others = [c for c in lineage if c is not object and c not in torchs and c.__module__ != "typing"]
    touched = {name for base in torchs for name in vars(base)} - _HARMLESS | {"param_groups", "state"}
    # torch itself puts its step on a subclass, with a decorator around it.
    return [
        (c, name)
        for c in others
        for name, value in vars(c).items()
        if name in touched and not (name == "step" and _is_torchs(value))
    ]


def _is_torchs(step: Any) -> bool:
    """Whether a step is defined in torch.optim, with nothing but torch's own decorators around it."""
    while True:
        step = getattr(step, "__func__", step)
        if not isinstance(step, FunctionType):
            return False
        # Not __module__, which functools.wraps copies.
        module = step.__globals__.get("__name__", "")
        inner = getattr(step, "__wrapped__", None)
        if inner is None:
            return bool(module.startswith("torch.optim."))
        if not module.startswith("torch."):
            return False
        step = inner


def _check_own_step(optimizer: Optimizer) -> None:
    """Raises where something happens at each step that is meant to happen once for all parameters."""
    own = vars(optimizer).get("step")  # a learning rate schedule puts one there, which is torch's
    if own is not None and not _is_torchs(own):
        raise ValueError(
            f"optimizer: its step was replaced, by something that would be called once for each parameter. Either "
            f"{_ONE_EACH}; or {_AT_THE_STEP}"
        )
    if getattr(optimizer, "_optimizer_step_pre_hooks", None) or getattr(
        optimizer, "_optimizer_step_post_hooks", None
    ):
        raise ValueError(
            "optimizer: has hooks on its step (register_step_pre_hook, register_step_post_hook; "
            "ComponentClipper.attach is one), which would be called once for each parameter. Remove them, or "
            f"{_ONE_EACH}"
        )
