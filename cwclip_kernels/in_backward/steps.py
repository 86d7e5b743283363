"""Stepping one parameter at a time, right after its gradient is clipped."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

from torch import Tensor
from torch.optim import Optimizer

from ..arguments import type_name
from ..core.optimizers import attached_clippers, clipping_optimizer, inside_of, parameters_of, runs_hooks
from ..core.run import Update
from ..optim.adamw import ComponentClipAdamW
from ..optim.clipping import are_equal
from ..result import ClipResult
from ..thresholds.constant import MaxNorm
from .checks import AT_THE_STEP

Optimizers: TypeAlias = "Optimizer | Mapping[Tensor, Optimizer]"

_ONE_EACH = "give each parameter an optimizer of its own: optimizer={p: Optimizer([p], ...) for p in parameters}"


class Steps:
    """Steps single parameters: each with its own optimizer, or all with a shared one that sees one at a time.

    Refuses an optimizer for which that isn't the same as one step of all parameters.
    """

    def __init__(self, optimizer: object, names: Sequence[str], tensors: Sequence[Tensor]) -> None:
        self._shared: Optimizer | None = None
        self._groups: dict[int, dict[str, Any]] = {}  # of the shared optimizer, by id of the parameter
        self._own: dict[int, tuple[str, Optimizer]] = {}
        if not isinstance(optimizer, Mapping):
            self._shared = _checked(optimizer, ", a mapping of parameters to optimizers, or None", tensors)
            if not isinstance(self._shared, ComponentClipAdamW):
                _check_clips_not(self._shared, tensors)
                _check_class(type(self._shared))
            elif not _is_known(type(self._shared).step):
                kind = type_name(self._shared)
                raise ValueError(f"optimizer: {kind} has a step of its own, which wouldn't be called; {AT_THE_STEP}")
            self.begin()
            if not any(id(tensor) in self._groups for tensor in tensors):
                raise ValueError("optimizer: owns none of the parameters")
            return
        name_of = dict(zip(map(id, tensors), names, strict=True))
        for parameter, own in optimizer.items():
            if not isinstance(parameter, Tensor):
                raise TypeError(f"optimizer: the keys of a mapping are parameters, not {type_name(parameter)}")
            if id(parameter) not in name_of:
                raise ValueError(f"optimizer: a key of shape {list(parameter.shape)} is none of the parameters")
            name = name_of[id(parameter)]
            self._own[id(parameter)] = name, _checked(own, f" for {name!r}", tensors)
            _check_clips_not(own, tensors)
            if list(map(id, parameters_of(own))) != [id(parameter)]:
                raise ValueError(
                    f"optimizer: the one for {name!r} must own that parameter and no other: Optimizer([p], ...)"
                )
        if not self._own:
            raise ValueError("optimizer: a mapping of no parameter")

    def begin(self) -> None:
        """Called before a pass's first gradient: checks a shared optimizer's step, and reads its present groups."""
        if self._shared is not None:
            _check_step_is_own(self._shared)
            self._groups = {id(p): group for group in self._shared.param_groups for p in group["params"]}

    def report(self, result: ClipResult) -> None:
        """Tells an optimizer that clips by itself what came of a pass."""
        if isinstance(self._shared, ComponentClipAdamW):
            self._shared._clipping.last = result
            self._shared._opt_called = True  # type: ignore[attr-defined]  # for learning rate schedulers

    def max_norm(self, tensors: Sequence[Tensor]) -> MaxNorm | None:
        """What an optimizer that clips by itself clips these parameters by at present; None for others."""
        if not isinstance(self._shared, ComponentClipAdamW):
            return None
        groups = {id(group): group for p in tensors if (group := self._groups.get(id(p))) is not None}
        caps: list[MaxNorm] = [group["max_norm"] for group in groups.values()]
        if not all(are_equal(caps[0], cap) for cap in caps):
            raise ValueError("optimizer: its param groups have different max_norm now; give them one")
        return caps[0] if caps else None

    def parameters(self) -> list[Tensor]:
        """All that are stepped."""
        optimizers = [own for _, own in self._own.values()] if self._shared is None else [self._shared]
        return [p for optimizer in optimizers for p in parameters_of(optimizer)]

    def update_of(self, parameter: Tensor) -> Update | None:
        """The step of an optimizer that clips by itself; None for others."""
        group = self._groups.get(id(parameter))
        if group is None or not isinstance(self._shared, ComponentClipAdamW):
            return None
        return self._shared._update_one(parameter, group)

    def step_of(self, parameter: Tensor) -> Callable[[], object] | None:
        """What steps this parameter after it is clipped; None if no optimizer owns it."""
        if id(parameter) in self._own:
            name, optimizer = self._own[id(parameter)]
            if list(map(id, parameters_of(optimizer))) != [id(parameter)]:
                raise RuntimeError(f"optimizer: the one for {name!r} doesn't own that parameter alone any more")
            return optimizer.step
        group = self._groups.get(id(parameter))
        if group is None or self._shared is None or isinstance(self._shared, ComponentClipAdamW):
            return None
        return partial(_step_alone, self._shared, group, parameter)


def _step_alone(optimizer: Optimizer, group: dict[str, Any], parameter: Tensor) -> None:
    # The group is copied each time, with its present options: torch's optimizers write nothing to it in a step.
    groups, optimizer.param_groups = optimizer.param_groups, [{**group, "params": [parameter]}]
    try:
        optimizer.step()
    finally:
        optimizer.param_groups = groups


def _checked(optimizer: object, wanted: str, tensors: Sequence[Tensor]) -> Optimizer:
    """An optimizer that wraps no other, doesn't clip the same parameters, and whose step needs no argument."""
    kind = type_name(optimizer)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer: expected a torch.optim.Optimizer{wanted}, not {kind}{inside_of(optimizer)}")
    inner = inside_of(optimizer)
    if inner and not runs_hooks(optimizer):
        raise TypeError(f"optimizer: a {kind} wraps one; pass the optimizer inside{inner}")
    too = attached_clippers(optimizer, tensors)
    if too:
        raise ValueError(
            f"optimizer: a clipper that was attached to it (ComponentClipper.attach) clips {too[0][1]!r} as well; "
            "remove() that one's handle, or don't call clip_in_backward"
        )
    arguments = list(inspect.signature(type(optimizer).step).parameters.values())[1:]
    variadic = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    needed = [a.name for a in arguments if a.default is inspect.Parameter.empty and a.kind not in variadic]
    if needed:
        raise ValueError(
            f"optimizer: {kind} needs {needed[0]!r} at its step, which takes all parameters at once; {AT_THE_STEP}"
        )
    return optimizer


def _check_clips_not(optimizer: Optimizer, tensors: Sequence[Tensor]) -> None:
    """Raises ValueError if the step of an optimizer, or of one inside it, would clip again."""
    clipping = clipping_optimizer(optimizer, tensors)
    if clipping is not None:
        kind = type_name(clipping)
        raise ValueError(
            f"optimizer: {kind} clips in its own step, after clip_in_backward has clipped the same gradients; pass "
            f"one {kind} of all parameters, clip_in_backward(optimizer=...), or use torch.optim.AdamW"
        )


def _check_class(kind: type[Optimizer]) -> None:
    """Raises unless a step is torch.optim's own, which keeps all its state with the parameter."""
    bases = [base for base in kind.__mro__ if base.__module__.split(".")[:2] == ["torch", "optim"]]
    names = {name for base in bases for name in vars(base) if not name.startswith("__")} | {"param_groups", "state"}
    names -= {"state_dict", "load_state_dict", "zero_grad", "add_param_group"}  # which a step doesn't call
    changed = [
        f"{other.__module__}.{other.__qualname__}.{name}"
        for other in kind.__mro__
        if other not in bases
        for name, value in vars(other).items()
        # torch itself puts its step, decorated, on a subclass.
        if name in names and not (name == "step" and _is_known(value))
    ]
    if not changed and not _is_known(kind.step):
        changed = [f"{kind.__module__}.{kind.__qualname__}.step"]
    if changed:
        raise ValueError(
            f"optimizer: {changed[0]} is not torch.optim's own. Called once for each parameter, it may count each "
            "call as a step, in param_groups for example, or need statistics over several parameters. Either "
            f"{_ONE_EACH}; or {AT_THE_STEP}"
        )


def _is_known(step: Any) -> bool:
    """Whether torch.optim or this package defines this step, with no decorators around it but torch's own."""
    step = getattr(step, "__func__", step)
    # Not step.__module__, which functools.wraps copies.
    module: str = getattr(step, "__globals__", {}).get("__name__", "")
    if not hasattr(step, "__wrapped__"):
        return module.startswith(("torch.optim.", "cwclip_kernels.optim."))
    return module.startswith("torch.") and _is_known(step.__wrapped__)


def _check_step_is_own(optimizer: Optimizer) -> None:
    """Raises where each step does something that is meant to happen once for all parameters."""
    step = vars(optimizer).get("step")  # put there by a learning rate scheduler, for one
    if step is not None and not _is_known(step):
        raise ValueError(
            "optimizer: its step was replaced, by something that would be called once for each parameter. Either "
            f"{_ONE_EACH}; or {AT_THE_STEP}"
        )
    if any(getattr(optimizer, f"_optimizer_step_{when}_hooks", None) for when in ("pre", "post")):
        raise ValueError(
            "optimizer: has hooks on its step (register_step_pre_hook, register_step_post_hook; "
            "ComponentClipper.attach is one), which would be called once for each parameter. Remove them, or "
            f"{_ONE_EACH}"
        )
