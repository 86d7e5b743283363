"""What ``clip_in_backward`` leaves on each parameter: the hook that autograd calls when its gradient is final."""

from __future__ import annotations

import sys
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..components.membership import Components, Slice
from ..core.modes import is_traced
from ..core.session import ClipSession
from ..distributed.shards import is_dtensor
from .checks import AT_THE_STEP
from .passes import Mark, Own, Pass


def clipped_in_backward(parameter: Tensor) -> bool:
    """Whether ``clip_in_backward`` clips this parameter's gradient now, so that nothing else should.

    Example:
        >>> import torch
        >>> from cwclip_kernels import clip_in_backward
        >>> from cwclip_kernels.in_backward import clipped_in_backward
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> with clip_in_backward([weight], 1.0):
        ...     clipped_in_backward(weight)
        True
        >>> clipped_in_backward(weight)
        False
    """
    return any(hook.components is not None for hook in hooks_of(parameter))


@dataclass(eq=False)
class ParameterHook:
    """Called by autograd when a parameter's gradient is final. Holds no reference to the parameter."""

    on_gradient: Callable[[ParameterHook, Tensor], None]
    name: str
    was_frozen: bool
    components: Components | None = None  # of this parameter alone; None if it isn't clipped but only stepped
    own: Own = ()  # where they are among all K
    shared: str | None = None  # a component that it shares with others, if it was frozen
    session: ClipSession | None = None  # made at the first gradient, since a frozen parameter may never have one
    last_pass: weakref.ref[Pass] | None = None
    clipped: Mark | None = None  # the gradient as it was clipped; None once it was freed
    references: int = 0  # to the parameter, when its last gradient came

    clips_by_component: ClassVar[bool] = True  # how ComponentClipper.attach recognises it

    def __call__(self, parameter: Tensor) -> None:
        """What autograd calls."""
        # Before anything else is called, which compiled autograd would trace.
        if (
            is_traced()
            or getattr(sys.modules.get("torch._dynamo.compiled_autograd"), "in_compiled_autograd_region", False)
            or torch._C._current_graph_task_id() == -1
        ):
            raise RuntimeError(
                "clip_in_backward: under compiled autograd the end of the backward pass isn't known, so nothing "
                "would be learnt or reported. Switch it off (torch._dynamo.config.compiled_autograd = False; the "
                f"model may stay compiled), or {AT_THE_STEP}"
            )
        self.on_gradient(self, parameter)

    def check_complete(self, current: Pass, grad: Tensor) -> None:
        """Raises where this gradient is only a part of what should be clipped, or has been clipped in part."""
        before = None if self.last_pass is None else self.last_pass()
        if before is not None and not before.is_over:
            raise RuntimeError(
                f"{self.name!r} got a second gradient in one backward pass, after the first had been clipped, as a "
                "tied parameter does under reentrant checkpointing. Use checkpoint(..., use_reentrant=False), or "
                f"{AT_THE_STEP}"
            )
        if self.clipped is not None and self.clipped.writes(grad) == 1:  # two, if it was zeroed before
            raise RuntimeError(
                f"the gradient of {self.name!r} was added to one that is clipped already: gradient accumulation "
                "can't be clipped in the backward pass; or it was zeroed through .data, which looks the same. Call "
                f"zero_grad() between backward passes, or {AT_THE_STEP}"
            )
        self.last_pass = weakref.ref(current)


def hooks_of(parameter: Tensor) -> list[ParameterHook]:
    """The hooks that ``clip_in_backward`` left on this parameter."""
    hooks = getattr(parameter, "_post_accumulate_grad_hooks", None)
    return [hook for hook in hooks.values() if isinstance(hook, ParameterHook)] if hooks else []


def hooks_for(
    components: Components, tensors: Sequence[Tensor], on_gradient: Callable[[ParameterHook, Tensor], None]
) -> Iterator[tuple[Tensor, ParameterHook]]:
    """Each parameter that may ever have a gradient, with its hook; refuses components of several trained ones."""
    members: dict[int, list[tuple[int, Slice]]] = defaultdict(list)
    sharers: dict[int, dict[int, None]] = defaultdict(dict)  # ordered
    for position, component, place in components.members:
        members[position].append((component, place))
        sharers[component][position] = None
    names = components.tensor_names
    for component, positions in sharers.items():
        trained = [names[i] for i in positions if tensors[i].requires_grad]
        if len(trained) > 1:
            raise ValueError(
                f"components: {components.names[component]!r} consists of several parameters ({trained[0]!r}, "
                f"{trained[1]!r}, ...), whose gradients are not final together; use components='parameter' or "
                f"slices of parameters, or {AT_THE_STEP}"
            )
    problems = dict(components.problems)
    for position, (name, tensor) in enumerate(zip(names, tensors, strict=True)):
        if not _takes_hooks(tensor):
            continue
        hook = ParameterHook(on_gradient, name, not tensor.requires_grad)
        own = sorted({component for component, _ in members[position]})
        if own:
            number = {component: i for i, component in enumerate(own)}
            hook.components = Components(
                tuple(components.names[component] for component in own),
                (name,),
                tuple((0, number[component], place) for component, place in members[position]),
                ((0, problems[position]),) if position in problems else (),
            )
            hook.own = slice(own[0], own[-1] + 1) if own[-1] - own[0] + 1 == len(own) else own
            if hook.was_frozen:
                hook.shared = next((components.names[c] for c in own if len(sharers[c]) > 1), None)
        yield tensor, hook


def _takes_hooks(tensor: Tensor) -> bool:
    """Whether it is trained, or frozen and can be trained later."""
    can_require_grad = (tensor.is_floating_point() or tensor.is_complex()) and not tensor.is_inference()
    is_known = type(tensor) in (Tensor, nn.Parameter) or is_dtensor(tensor)
    return tensor.requires_grad or (can_require_grad and is_known)


def register(parameter: Any, hook: ParameterHook) -> Any:
    """Puts a hook on a parameter, frozen or not. Returns torch's handle."""
    is_trained = parameter.requires_grad
    try:
        parameter.requires_grad_(True)  # torch takes a hook only so; it stays when the parameter is frozen again
        handle = parameter.register_post_accumulate_grad_hook(hook)
        # swap_tensors moves autograd's reference to the hooks, but not this dict of them; assigning it sets it anew.
        parameter._post_accumulate_grad_hooks = parameter._post_accumulate_grad_hooks
    finally:
        parameter.requires_grad_(is_trained)
    return handle
