"""Clipping at an optimizer's step, by a hook that runs right before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from .arguments import check_type, type_name
from .core.loss_scale import UNSCALED
from .core.modes import is_traced
from .core.optimizers import (
    OptimizerPart,
    OptimizerParts,
    attached_clippers,
    check_runs_hooks,
    clipping_optimizer,
    is_compiled_in_parts,
    may_step_within_step,
    outer_steps,
    runner_of_hooks,
)
from .core.parameter_clipper import ParameterClipper
from .handle import Handle
from .result import ClipResult


class Attachment(Handle):
    """A clipper at work in an optimizer; made by ``ComponentClipper.attach``. As a context manager it ends itself.

    It can't be copied or pickled, nor can a module that holds it. A copied optimizer has no hooks: attach to it.

    Attributes:
        clipper: what was attached.
        last: what the last step's clipping found and did; None before the first.

    Example:
        >>> import torch
        >>> from cwclip_kernels import ComponentClipper
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        >>> with ComponentClipper(model, max_norm=0.1).attach(optimizer) as attachment:
        ...     model(torch.ones(1, 2)).sum().backward()
        ...     optimizer.step()
        >>> attachment.last.norms
        tensor([1.4142, 1.0000])
    """

    _not_copied = "an Attachment of one optimizer can't be copied or pickled: attach a clipper to the other optimizer"
    clips_by_component = True  # by which it is recognised among an optimizer's hooks

    def __init__(
        self,
        clipper: ParameterClipper,
        optimizer: Optimizer,
        on_clip: Callable[[ClipResult], object] | None,
        replace: bool = False,
    ) -> None:
        check_type(replace, "replace", bool, "a bool")
        check_runs_hooks(optimizer)
        runner_of_hooks()
        self.clipper = clipper
        self._max_norm = clipper.max_norm
        self._on_clip = on_clip
        self._parts = OptimizerParts(clipper)
        self._may_nest = may_step_within_step(optimizer)
        self._part = self._part_of(optimizer)
        self._part.check_not_in_backward()
        clipping = clipping_optimizer(optimizer, self._part.clipped)
        if clipping is not None:
            raise ValueError(
                f"optimizer: {type_name(clipping)} clips in its own step, and an attached clipper would clip the "
                "same gradients before; don't attach one, or use torch.optim.AdamW"
            )
        earlier = attached_clippers(optimizer, self._part.clipped)
        if earlier and not replace:
            raise ValueError(
                f"optimizer: a clipper that was attached to it before clips {earlier[0][1]!r} as well; call its "
                "handle's remove(), or attach(..., replace=True)"
            )
        for attachment, _ in earlier:
            attachment.remove()
        self._hook = optimizer.register_step_pre_hook(self._before_step)

    def remove(self) -> None:
        """Ends clipping at this optimizer's steps."""
        self._hook.remove()

    def _part_of(self, optimizer: Optimizer) -> OptimizerPart:
        part = self._parts.of(optimizer)
        if not part.clipped:
            raise ValueError("optimizer: owns none of the parameters that this clipper clips")
        return part

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if is_traced():
            if self._may_nest:
                torch._dynamo.graph_break()  # an error raised while Dynamo traces only makes it go on untraced
                raise RuntimeError(_nested(optimizer))
        elif self._is_inside(optimizer):
            return None
        # What torch.amp.GradScaler.step hands to an optimizer that unscales by itself.
        if getattr(optimizer, "grad_scale", None) is not None or kwargs.get("grad_scaler") is not None:
            raise RuntimeError(
                f"{type_name(optimizer)} unscales its gradients by itself, so they can't be clipped here: call "
                "scaler.unscale_(optimizer) before scaler.step(optimizer), or use ComponentClipGradScaler"
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

    def _is_inside(self, optimizer: Optimizer) -> bool:
        """Whether this is a step within a step that has clipped; raises if another clipper has, or if it can't tell.

        If a step calls super().step(), torch runs the hooks twice, but only if the base class was used before.
        """
        if self._may_nest and is_compiled_in_parts():
            raise RuntimeError(_nested(optimizer))
        for outer in outer_steps():
            if outer is optimizer:
                return True
            shared = attached_clippers(outer, self._part.clipped, but=self)
            if shared:
                raise RuntimeError(
                    f"optimizer: this {type_name(optimizer)} steps inside of a {type_name(outer)}, and the clippers "
                    f"attached to both clip {shared[0][1]!r}; remove() one of their handles"
                )
        return False

    def _clip(self, optimizer: Optimizer) -> None:
        part = self._part_of(optimizer)
        if part is not self._part:  # parameters came or went
            shared = attached_clippers(optimizer, part.clipped, but=self)
            if shared:
                raise RuntimeError(
                    f"optimizer: two clippers that are attached to it clip {shared[0][1]!r}, which came into its "
                    "param_groups later; remove() one of their handles"
                )
            self._part = part
        if not is_traced():
            part.check_not_in_backward()
        self.last = part.clipper.clip(UNSCALED)
        if self._on_clip is not None:
            self._on_clip(self.last)


def _nested(optimizer: Optimizer) -> str:
    return (
        f"optimizer: the step() of this {type_name(optimizer)} may call another step, which would clip again, and a "
        "compiled function can't tell; don't compile the step, or call clip_() before it, uncompiled"
    )
