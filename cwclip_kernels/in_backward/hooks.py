"""What ``clip_in_backward`` leaves on a parameter: one hook that recognises what must not be clipped again."""

from __future__ import annotations

import sys
import weakref
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.multiprocessing.reductions import StorageWeakRef

from ..components.membership import Components, Slice
from ..core.session import ClipSession
from ..distributed.shards import is_dtensor

if TYPE_CHECKING:
    from .passes import Pass


Own: TypeAlias = "slice | list[int]"


class Clips(Protocol):
    """Whoever clips a parameter when its hook says that its gradient is there."""

    def on_gradient(self, hook: ParameterHook, parameter: Tensor) -> None:
        """Clips and perhaps steps ``parameter``."""


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
    return any(hook.clips for hook in hooks_of(parameter))


def hooks_of(parameter: Tensor) -> list[ParameterHook]:
    """The hooks that ``clip_in_backward`` left on this parameter."""
    hooks = getattr(parameter, "_post_accumulate_grad_hooks", None)
    return [hook for hook in hooks.values() if isinstance(hook, ParameterHook)] if hooks else []


class ParameterHook:
    """Called by autograd when a parameter's gradient is final. Holds no reference to the parameter.

    Args:
        clipping: whose hook it is.
        name: of the parameter.
        components: this parameter's alone, None if it isn't clipped but only stepped.
        own: where these are among all K.
        whole: False if other parameters belong to the component, so that this one, frozen until now, can't be
            clipped by itself.
        was_frozen: whether the parameter is frozen now.

    Attributes:
        clipping: whose hook it is.
        name: of the parameter.
        own: where its components are among all K.
        was_frozen: whether the parameter was frozen at set-up.
    """

    clips_by_component = True  # by which others recognise it that would clip as well

    def __init__(
        self,
        clipping: Clips,
        name: str,
        components: Components | None,
        own: Own,
        *,
        whole: bool = True,
        was_frozen: bool = False,
    ) -> None:
        self.clipping = clipping
        self.name = name
        self.own = own
        self.was_frozen = was_frozen
        self._components = components
        self._whole = whole
        self._engine: ClipSession | None = None
        self._clipped: _Mark | None = None
        self._seen: weakref.ref[Pass] | None = None
        self._references: int | None = None

    def __call__(self, parameter: Tensor) -> None:
        """What autograd calls."""
        # Before anything else is called, which compiled autograd would trace.
        if (
            is_dynamo_compiling()
            or getattr(sys.modules.get("torch._dynamo.compiled_autograd"), "in_compiled_autograd_region", False)
            or torch._C._current_graph_task_id() == -1
        ):
            raise RuntimeError(_COMPILED)
        self.clipping.on_gradient(self, parameter)

    @property
    def clips(self) -> bool:
        """Whether the parameter is clipped, and not only stepped."""
        return self._components is not None

    def engine(self, parameter: Tensor) -> ClipSession:
        """What clips the parameter by itself; made when it is first needed, since a frozen parameter may never be."""
        assert self._components is not None
        if not self._whole:
            raise RuntimeError(
                f"components: {self._components.names[0]!r} consists of several parameters, one of which, "
                f"{self.name!r}, required no grad when clip_in_backward was set up; remove() the handle and set it "
                "up again, with components='parameter'"
            )
        if self._engine is None:
            self._engine = ClipSession(self._components, (parameter,))
        return self._engine

    def check(self, current: Pass, grad: Tensor) -> None:
        """Raises where this gradient is only a part of what was to be clipped whole."""
        before = None if self._seen is None else self._seen()
        if before is not None and not before.is_over:
            raise RuntimeError(
                f"{self.name!r} got a second gradient in one backward pass, after the first had been clipped, as a "
                "tied parameter does under reentrant checkpointing. Use checkpoint(..., use_reentrant=False), or "
                "clip once at the step: ComponentClipper.attach(optimizer)"
            )
        if self._clipped is not None and self._clipped.was_written_once(grad):
            raise RuntimeError(
                f"the gradient of {self.name!r} was added to one that is clipped already: gradient accumulation "
                "can't be clipped in the backward pass; or it was zeroed through .data, which can't be told from "
                "that. Call zero_grad() between backward passes, or clip once at the step: "
                "ComponentClipper.attach(optimizer)"
            )
        self._seen = weakref.ref(current)

    def has_more_references(self, parameter: Tensor) -> bool:
        """Whether somebody has got hold of the parameter since the last time, as a wrapper would; False at first."""
        before, self._references = self._references, sys.getrefcount(parameter)
        return before is not None and self._references > before

    def remember(self, grad: Tensor | None) -> None:
        """Keeps in mind the gradient as it was clipped; None where it has been freed."""
        self._clipped = None if grad is None else _Mark(grad)


_COMPILED = (
    "clip_in_backward: under compiled autograd the end of the backward pass never comes, so that nothing would be "
    "learnt or reported. Switch it off (torch._dynamo.config.compiled_autograd = False; the model may stay compiled) "
    "or clip at the step: ComponentClipper.attach(optimizer)"
)


_weak: Any = StorageWeakRef


class _Mark:
    """A gradient as it was clipped: recognised without keeping it.

    And without a weak reference to the tensor, which would forbid ``torch.utils.swap_tensors`` and with it moving
    some models.
    """

    def __init__(self, grad: Tensor) -> None:
        self._identity = id(grad)
        # While this is kept no other storage gets its address. A sparse gradient has no storage; but there a new one
        # begins with version 0, and can't be taken for the old one.
        self._storage: Any = None if grad.is_sparse else _weak(grad.untyped_storage())
        self._version = grad._version

    def was_written_once(self, grad: Tensor) -> bool:
        """Added to since then; zeroing it, too, would have made two."""
        return self._is_of(grad) and grad._version == self._version + 1

    def _is_of(self, grad: Tensor) -> bool:
        if id(grad) != self._identity or grad.is_sparse != (self._storage is None):
            return False
        return self._storage is None or self._storage.cdata == grad.untyped_storage()._cdata


def parameter_hook(
    clipping: Clips,
    components: Components,
    position: int,
    members: list[tuple[int, Slice]],
    *,
    whole: bool,
    was_frozen: bool,
) -> ParameterHook:
    """The hook of the parameter at this position.

    Args:
        clipping: whose hook it is.
        components: all K.
        position: of the parameter.
        members: component and place of its slices; empty if it isn't clipped.
        whole: as for ``ParameterHook``.
        was_frozen: likewise.
    """
    name = components.tensor_names[position]
    if not members:
        return ParameterHook(clipping, name, None, [])
    own = sorted({component for component, _ in members})
    place = {component: i for i, component in enumerate(own)}
    alone = tuple((0, place[component], box) for component, box in members)
    mine = Components(tuple(components.names[i] for i in own), (name,), alone)
    is_run = own[-1] - own[0] + 1 == len(own)
    return ParameterHook(
        clipping, name, mine, slice(own[0], own[-1] + 1) if is_run else own, whole=whole, was_frozen=was_frozen
    )


def can_be_watched(tensor: Tensor) -> bool:
    """Whether a hook can be put on it: a frozen parameter, too, if it may ever be trained."""
    if tensor.requires_grad:
        return True
    is_number = tensor.is_floating_point() or tensor.is_complex()
    return is_number and not tensor.is_inference() and (type(tensor) in (Tensor, nn.Parameter) or is_dtensor(tensor))


def watch(tensor: Tensor, hook: ParameterHook) -> Any:
    """Puts a hook on a parameter, frozen ones included: they may be trained later. Returns torch's handle."""
    frozen = not tensor.requires_grad
    parameter: Any = tensor
    try:
        if frozen:
            parameter.requires_grad_(True)  # torch takes a hook only so; it stays when that is taken back
        handle = parameter.register_post_accumulate_grad_hook(hook)
        # swap_tensors moves what autograd knows of the hooks and leaves the list of them, which autograd then
        # doesn't look at any more; assigning it tells autograd again.
        parameter._post_accumulate_grad_hooks = parameter._post_accumulate_grad_hooks
    finally:
        if frozen:
            parameter.requires_grad_(False)
    return handle
