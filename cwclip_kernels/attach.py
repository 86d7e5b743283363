"""Clipping at an optimizer's step, by a hook that runs right before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from .components import type_name

if TYPE_CHECKING:
    from .clipper import ClipResult, ComponentClipper


class Attachment:
    """A clipper at work in an optimizer; made by ``ComponentClipper.attach``. As a context manager it ends itself.

    Attributes:
        last: what the last step's clipping found and did; None before the first.
    """

    def __init__(
        self, clipper: ComponentClipper, optimizer: Optimizer, on_clip: Callable[[ClipResult], object] | None
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"optimizer: expected a torch.optim.Optimizer, not {type_name(optimizer)}; of a wrapper pass the "
                "optimizer inside"
            )
        self.last: ClipResult | None = None
        self._owner = clipper
        self._on_clip = on_clip
        self._owned: tuple[int, ...] = ()
        self._part = clipper
        self._look_up_owned(optimizer)
        self._hook = optimizer.register_step_pre_hook(self._before_step)

    def remove(self) -> None:
        """Ends clipping at this optimizer's steps."""
        self._hook.remove()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _look_up_owned(self, optimizer: Optimizer) -> None:
        """Finds the parameters that are the optimizer's, anew when it was given others."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        owned = tuple(map(id, parameters))
        if owned != self._owned:
            part = self._owner.part(parameters)
            if not part.parameters:
                raise ValueError("optimizer: owns none of the parameters that this clipper clips")
            self._owned, self._part = owned, part

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        # What an optimizer that unscales by itself is handed by torch.amp.GradScaler.step.
        if getattr(optimizer, "grad_scale", None) is not None or kwargs.get("grad_scaler") is not None:
            raise RuntimeError(
                f"{type_name(optimizer)} unscales its gradients by itself, so here they still carry the loss's scale "
                "and can't be clipped: call scaler.unscale_(optimizer) before scaler.step(optimizer), or use "
                "cwclip_kernels.ComponentClipGradScaler"
            )
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._clip(optimizer)
            return None

        # With a closure there are no gradients yet.
        def clipped() -> Any:
            loss = closure()
            self._clip(optimizer)
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": clipped}
        return (args[0], clipped, *args[2:]), kwargs

    def _clip(self, optimizer: Optimizer) -> None:
        self._look_up_owned(optimizer)
        self.last = self._part.clip_()
        if self._on_clip is not None:
            self._on_clip(self.last)
